"""Sample keys of a data set, read once: which rows can be read, and which content each one holds."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pipeline.data.source import Row, Source, Stamp
from pipeline.encode.quarantine import ENDS_THE_RUN, BadSample, set_aside
from pipeline.encode.stat_cache import StatCache
from pipeline.errors import BadSampleError
from pipeline.keys import KEY_BYTES

KEYED_AT_ONCE = 256
PROBES = 1 << 10
"""Rows among which the first two of unequal shapes are looked for."""


@dataclass(frozen=True)
class KeyedSamples:
    """The keys of a data set."""

    keys: np.ndarray
    """(N, 16) uint8, one per row; zeros where the row cannot be read."""
    sizes: np.ndarray
    """(N,) int64, size of the content in bytes, characters or items."""
    bad: list[BadSample]
    """Rows set aside: they cannot be read or, after an encode, have no state."""
    rows: np.ndarray | None = None
    """The rows that are meant, (m,) int64; None for all."""

    @property
    def good(self) -> np.ndarray:
        """The rows that are meant and not set aside, (n,) int64."""
        rows = np.arange(len(self.keys)) if self.rows is None else self.rows
        return np.setdiff1d(rows, [sample.row for sample in self.bad])

    def selected(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` (n,) int64 that are meant."""
        return rows if self.rows is None else np.intersect1d(rows, self.rows)

    @property
    def probes(self) -> np.ndarray:
        """The first rows `outside_in`, at most `PROBES`: those on which it is found out how states are trimmed."""
        return self.outside_in()[:PROBES]

    def outside_in(self) -> np.ndarray:
        """Return the good rows by size: the shortest content, the longest, the second shortest, and so on."""
        good = self.good
        by_size = good[np.argsort(self.sizes[good], kind="stable")]
        order = np.empty_like(by_size)
        order[::2], order[1::2] = by_size[: (len(by_size) + 1) // 2], by_size[::-1][: len(by_size) // 2]
        return order


def key_contents(source: Source, *, workers: int, cache: StatCache | None = None, trust: bool = True) -> KeyedSamples:
    """Return the key of every content of `source`, read once for it in `workers` threads.

    A file that `cache` knows by its stamp is not read, unless `trust` is False: then it is, and the cache is renewed.
    """
    count, now = len(source), time.time_ns()
    keys, sizes = np.zeros((count, KEY_BYTES), np.uint8), np.zeros(count, np.int64)
    stamps = [_stamp(source, row) for row in range(count)]
    known = cache.find(stamps) if cache and trust else {}
    keys[list(known)] = np.frombuffer(b"".join(known.values()), np.uint8).reshape(-1, KEY_BYTES)
    sizes[list(known)] = [stamp.size for row in known if (stamp := stamps[row])]

    def key_some(begin: int) -> list[BadSample]:
        bad = []
        for row in range(begin, min(begin + KEYED_AT_ONCE, count)):
            try:
                _check_row(source.row(row))
                if row not in known:
                    key, sizes[row] = _read_key(source, row)
                    keys[row] = np.frombuffer(key, np.uint8)
            except ENDS_THE_RUN:
                raise
            except BaseException as error:
                keys[row], sizes[row] = 0, 0
                bad.append(set_aside(source, row, error))
        return bad

    bad: list[BadSample] = []
    with (
        ThreadPoolExecutor(max_workers=workers) as pool,
        tqdm(total=count, desc="keys", unit="sample", disable=None) as progress,
    ):
        for found in pool.map(key_some, range(0, count, KEYED_AT_ONCE)):
            bad += found
            progress.update(min(KEYED_AT_ONCE, count - progress.n))
    keyed = KeyedSamples(keys, sizes, bad)
    if cache:
        read = np.setdiff1d(keyed.good, list(known)).tolist()
        steady = [(row, stamp) for row in read if (stamp := stamps[row]) and stamp == _stamp(source, row)]
        cache.update([(stamp, keys[row].tobytes()) for row, stamp in steady if stamp.settled(now)], stamps)
    return keyed


def _read_key(source: Source, row: int) -> tuple[bytes, int]:
    content = source.content(row)
    return source.key(row, content), sum(map(len, content)) if isinstance(content, tuple | list) else len(content)


def _stamp(source: Source, row: int) -> Stamp | None:
    """The stamp of a row; a source that cannot even give that has the row read, which tells what is wrong."""
    try:
        return source.stamp(row)
    except ENDS_THE_RUN:
        raise
    except BaseException:
        return None


def _check_row(row: Row) -> None:
    """Refuse what the sample table could not hold: on Linux a file may have any bytes for a name, and JSON any text."""
    try:
        row.source.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError("the name is not UTF-8; rename the file") from error
    for name, target in row.targets.items():
        for value in target if isinstance(target, list) else [target]:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise BadSampleError(f"a number beyond 64 bits: the target {name} is {value}; make it a text")
            if isinstance(value, str) and not value.isascii():
                _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"half of a character (a lone surrogate): the target {name} has it; mend it") from error
