"""The inner flow of encode: plan what each store lacks, run the units of the plan, check that every sample is stored.

A unit is committed as a whole, and the plan depends only on the keys and on what is committed: a rerun after a kill
makes the same segments.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pipeline.data.source import Source
from pipeline.encode.decoding import explain_dead_workers
from pipeline.encode.unit import EncodeResult, Outcome, Unit, check_rows, lacking_rows, plan
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
    before: EncodeResult,
    stores: Sequence[Sequence[Store]],
    wanted: Sequence[np.ndarray],
    *,
    segment_samples: int,
    segment_groups: np.ndarray | None = None,
) -> EncodeResult:
    """Encode the rows `wanted[view]` that `stores[view][cut]` lack; return what was done, added to `before`.

    Samples that `before.keyed` sets aside are left out. Where `segment_groups` (N,) int64 gives a group for each row,
    the samples of a segment belong to one group.

    Raises:
        TypeError: `wanted[view]` is not an array of row numbers.
        MissingKeysError: a sample was encoded but is not found; the message names the store.
    """
    check_rows(wanted)
    keyed = before.keyed
    units = plan(
        keyed.keys, [np.intersect1d(rows, keyed.good) for rows in wanted], stores, segment_samples, segment_groups
    )
    if not units:
        return before
    result = encode_units(executor, source, units, before)
    _check_stored(stores, [np.intersect1d(rows, result.keyed.good) for rows in wanted], keyed.keys)
    return result


def encode_units(executor: Executor, source: Source, units: Sequence[Unit], before: EncodeResult) -> EncodeResult:
    """Run `units`, planned from the keys of `before.keyed`; return what was done, added to `before`."""
    result = before.copy()
    total = sum(len(part.rows) for unit in units for part in unit.parts)
    start = time.perf_counter()
    with (
        explain_dead_workers(executor.workers),
        closing(executor.run(units)) as running,  # however this ends, what was computed is written first
        tqdm(total=total, desc="encode", unit="sample", disable=None, smoothing=0.05, leave=None) as progress,
    ):
        for outcome in running:
            result.add(outcome, source)
            progress.update(len(outcome.part.rows))
    result.costs.elapsed += time.perf_counter() - start
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
