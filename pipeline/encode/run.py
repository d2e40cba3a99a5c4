"""The inner flow of encode: plan what each store lacks, run the units of the plan, check that every sample is stored.

A unit is committed as a whole, and the plan depends only on the keys and on what is committed: a rerun after a kill
makes the same segments.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pipeline.data.source import Source
from pipeline.encode.decoding import explain_dead_workers
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample, name_of
from pipeline.encode.result import EncodeResult, Outcome
from pipeline.encode.unit import Unit, check_rows, lacking_rows, plan
from pipeline.errors import MissingKeysError
from pipeline.store import Store

PATIENCE_SECONDS = 60
"""Time a network file system may take to show what another machine wrote."""


class Executor(Protocol):
    """Runs units: an `Encoder` in this process, or a cluster of workers with one encoder each."""

    @property
    def workers(self) -> int:
        """Processes that read and preprocess for this one."""

    def run(self, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        """Run `units`, each at least once; yield the outcome of each of their parts, in any order, once committed.

        Closed before its end, it abandons the units that are not finished.
        """


def encode(
    executor: Executor,
    source: Source,
    keyed: KeyedSamples,
    stores: Sequence[Sequence[Store]],
    wanted: Sequence[np.ndarray],
    *,
    segment_samples: int,
    segment_groups: np.ndarray | None = None,
) -> EncodeResult:
    """Encode the rows `wanted[view]` that `stores[view][cut]` lack; return what was done.

    Samples that `keyed` sets aside are left out. Where `segment_groups` (N,) int64 gives a group for each row, the
    samples of a segment belong to one group.

    Raises:
        TypeError: `wanted[view]` is not an array of row numbers.
        MissingKeysError: a sample was encoded but is not found; the message names the store.
    """
    check_rows(wanted)
    units = plan(
        keyed.keys, [np.intersect1d(rows, keyed.good) for rows in wanted], stores, segment_samples, segment_groups
    )
    result = encode_units(executor, source, units, keyed, cuts=len(stores[0]))
    if units:
        _check_stored(stores, [np.intersect1d(rows, result.keyed.good) for rows in wanted], keyed.keys)
    return result


def encode_units(
    executor: Executor, source: Source, units: Sequence[Unit], keyed: KeyedSamples, cuts: int
) -> EncodeResult:
    """Run `units`, which are planned from the keys of `keyed`, with `executor`; return what was done for the `cuts`."""
    result = EncodeResult.empty(keyed, cuts)
    if not units:
        return result
    total = sum(len(part.rows) for unit in units for part in unit.parts)
    with (
        explain_dead_workers(executor.workers),
        closing(executor.run(units)) as running,  # however this ends, what was computed is written first
        tqdm(total=total, desc="encode", unit="sample", disable=None, smoothing=0.05, leave=None) as progress,
    ):
        for outcome in running:
            if outcome.bad:
                known = {sample.row for sample in result.keyed.bad}
                alike = [other for sample in outcome.bad for other in _same_content(sample, source, result.keyed)]
                result.keyed.bad.extend(sample for sample in alike if sample.row not in known)
            result.add(outcome)
            progress.update(len(outcome.part.rows))
    return result


def _check_stored(stores: Sequence[Sequence[Store]], wanted: Sequence[np.ndarray], keys: np.ndarray) -> None:
    """Check that every sample is in its stores; what another machine wrote may become visible a little later."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for rows, of_view in zip(wanted, stores, strict=True):
        for store in of_view:
            store.refresh()
            while absent := len(lacking_rows(keys, rows, store)):
                if time.monotonic() > deadline:
                    raise MissingKeysError(
                        f"{store.path}: {absent} samples that were encoded are not there after {PATIENCE_SECONDS} s; "
                        "let all workers write to the same folder, and run again"
                    )
                time.sleep(1)
                store.refresh()


def _same_content(sample: BadSample, source: Source, keyed: KeyedSamples) -> list[BadSample]:
    """Return `sample` and every other row with the same content, each under its own name."""
    rows = keyed.selected(np.flatnonzero((keyed.keys == keyed.keys[sample.row]).all(1)))
    return [replace(sample, row=row, source=name_of(source, row)) for row in rows.tolist()]
