"""Flow 1: raw data -> sample -> key -> prefix -> state -> segment -> store.

`encode` plans what each store lacks, and has the units of the plan run by the encoder. A unit is committed whole, and
the plan depends on nothing but the keys and what is committed: a rerun after a kill makes the same segments.
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
from pipeline.encode.encoded import Encoded, Outcome
from pipeline.encode.feed import Keyed, dead_workers_told
from pipeline.encode.quarantine import BadSample, name_of
from pipeline.encode.unit import Unit, check_rows, lacking_rows, plan
from pipeline.errors import MissingKeysError
from pipeline.store import Store

PATIENCE_SECONDS = 60
"""How long a network file system may take to show what another machine wrote."""


class Executor(Protocol):
    """Who runs units: an `Encoder` in this process, or a cluster of workers that have one each."""

    @property
    def workers(self) -> int:
        """Processes that read and preprocess for this one."""

    def run(self, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        """Run `units`, each at least once; yield what became of each of their parts, in any order, once committed.

        Closed before its end, it lets go of what it has begun.
        """


def encode(
    executor: Executor,
    source: Source,
    stores: Sequence[Sequence[Store]],
    size: int,
    wanted: Sequence[np.ndarray],
    done: Encoded,
    groups: np.ndarray | None = None,
) -> None:
    """Bring the rows `wanted[view]` into `stores[view][cut]`; what is there already is not made again.

    `size` is how many samples a segment has; the samples of a segment are of one group, where `groups` (N,) int64 says
    of which each row is. What is done is added to `done`; samples that were set aside before are left out.

    Raises:
        TypeError: `wanted[view]` is no array of row numbers.
        MissingKeysError: a sample was encoded, and is not there; the message names the store.
    """
    check_rows(wanted)
    units = plan(done.keyed.keys, _good(wanted, done), stores, size, groups)
    if units:
        encode_units(executor, source, units, done)
        _prove(stores, _good(wanted, done), done.keyed.keys)


def encode_units(executor: Executor, source: Source, units: Sequence[Unit], done: Encoded) -> None:
    """Have `executor` run `units`, which are planned from the keys of `done`, and add to `done` what was done."""
    total = sum(len(part.rows) for unit in units for part in unit.parts)
    with (
        dead_workers_told(executor.workers),
        closing(executor.run(units)) as running,  # whatever ends this, what was computed is written first
        tqdm(total=total, desc="encode", unit="sample", disable=None, smoothing=0.05, leave=None) as progress,
    ):
        for outcome in running:
            if outcome.bad:
                known = {sample.row for sample in done.keyed.bad}
                alike = [other for sample in outcome.bad for other in _alike(sample, source, done.keyed)]
                done.keyed.bad.extend(sample for sample in alike if sample.row not in known)
            done.add(outcome)
            progress.update(len(outcome.part.rows))


def _good(wanted: Sequence[np.ndarray], done: Encoded) -> list[np.ndarray]:
    return [np.intersect1d(rows, done.keyed.good) for rows in wanted]


def _prove(stores: Sequence[Sequence[Store]], wanted: Sequence[np.ndarray], keys: np.ndarray) -> None:
    """Look for every sample where it belongs; what another machine wrote may be seen here a little later."""
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


def _alike(sample: BadSample, source: Source, keyed: Keyed) -> list[BadSample]:
    """`sample` and every other row with the same content, each under its own name."""
    rows = keyed.meant(np.flatnonzero((keyed.keys == keyed.keys[sample.row]).all(1)))
    return [replace(sample, row=row, source=name_of(source, row)) for row in rows.tolist()]
