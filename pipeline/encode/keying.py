"""Sample keys of a data set: each content is read once and hashed; unreadable rows are set aside.

The keys of files are kept by path, size, mtime and inode in an SQLite file that may be deleted at any time and shared
by processes. A fault in it costs a warning and reading the files again, never the run.
"""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from pipeline.data.source import Row, Source, Stamp
from pipeline.encode.quarantine import BadSample, attempt, set_aside
from pipeline.errors import BadSampleError
from pipeline.keys import KEY_BYTES, content_key

log = logging.getLogger("recycle")

T = TypeVar("T")

KEYED_AT_ONCE = 256
TRIMMING_ROWS = 1 << 10
"""Number of rows searched for two samples of unequal shapes."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a character, which UTF-8 cannot encode."""
WAIT_SECONDS = 5.0
"""Time to wait for another process that holds the file."""
_PROBE = content_key([b"bytes", "text", ("two", "texts"), np.arange(3), {"of": None}])
VERSION = int.from_bytes(_PROBE[:4], "big") >> 1
"""Identifies the key function by its output for a fixed content; keys of another function are dropped. 31 bits."""


class StatCache:
    """The keys of files by their stamps, in the SQLite file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, stamps: Sequence[Stamp | None]) -> dict[int, bytes]:
        """Return the known keys by index in `stamps`; a file with another size, mtime or inode is unknown."""

        def look_up(connection: sqlite3.Connection) -> dict[int, bytes]:
            wanted = [(place, *_fields(stamp)) for place, stamp in enumerate(stamps) if stamp is not None]
            paths = {path for _, path, _ in wanted}
            # files of a data set lie side by side: one read of them all costs half as much as asking for each
            files = connection.execute(
                "SELECT path, stamp, key FROM files"
                " WHERE path BETWEEN ? AND ? AND typeof(key) = 'blob' AND length(key) = ?",
                (min(paths), max(paths), KEY_BYTES),
            )
            known = {(path, stamp): key for path, stamp, key in files if path in paths}
            return {place: known[path, stamp] for place, path, stamp in wanted if (path, stamp) in known}

        return (self._use(look_up) or {}) if any(stamps) else {}

    def update(self, keys: Iterable[tuple[Stamp, bytes]], present: Sequence[Stamp | None]) -> None:
        """Store `keys` and, if there are any, delete entries of missing files; `present` files are not checked."""
        new = [(*_fields(stamp), key) for stamp, key in keys]
        if not new:
            return
        seen = {os.fsencode(stamp.path) for stamp in present if stamp is not None}

        def write(connection: sqlite3.Connection) -> None:
            known = [path for (path,) in connection.execute("SELECT path FROM files")]
            gone = [(path,) for path in known if path not in seen and not os.path.lexists(path)]
            connection.executemany("DELETE FROM files WHERE path = ?", gone)
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", new)

        self._use(write)

    def _use(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run `action` in one transaction; return its result, or None with a warning if the file cannot be used.

        A damaged database, such as one torn by a crash, is deleted, and created again at the next use.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as connection, connection:
                _prepare(connection)
                return action(connection)
        except (sqlite3.Error, OSError) as error:
            log.warning("%s cannot be used (%s): files are read again; it is safe to delete", self.path, error)
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                with suppress(OSError):
                    self.path.unlink()
            return None


def _prepare(connection: sqlite3.Connection) -> None:
    if _version(connection) != VERSION:
        connection.execute("BEGIN IMMEDIATE")
        if _version(connection) != VERSION:  # another process may have made it meanwhile
            connection.execute("DROP TABLE IF EXISTS files")
            connection.execute("CREATE TABLE files (path BLOB PRIMARY KEY, stamp TEXT, key BLOB) WITHOUT ROWID")
            connection.execute(f"PRAGMA user_version = {VERSION}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _fields(stamp: Stamp) -> tuple[bytes, str]:
    """Return path and stamp as SQLite values: names may not be UTF-8, and numbers may exceed 64 bits."""
    return os.fsencode(stamp.path), f"{stamp.size} {stamp.mtime_ns} {stamp.inode}"


@dataclass(frozen=True)
class KeyedSamples:
    """The sample keys of a data set, the rows set aside, and the selected rows."""

    keys: np.ndarray
    """(N, 16) uint8, one per row; zeros where the row cannot be read."""
    sizes: np.ndarray
    """(N,) int64, size of the content in bytes, characters or items."""
    bad: list[BadSample]
    """Rows set aside: they cannot be read or, after an encode, have no state."""
    rows: np.ndarray | None = None
    """The selected rows, (m,) int64; None selects all."""

    @property
    def good(self) -> np.ndarray:
        """The selected rows that are not set aside, (n,) int64."""
        rows = np.arange(len(self.keys)) if self.rows is None else self.rows
        return np.setdiff1d(rows, [sample.row for sample in self.bad])

    def selected(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` (n,) int64 that are selected."""
        return rows if self.rows is None else np.intersect1d(rows, self.rows)

    @property
    def trimming_rows(self) -> np.ndarray:
        """The first rows of `outside_in`, at most `TRIMMING_ROWS`, used to determine how states are trimmed."""
        return self.outside_in()[:TRIMMING_ROWS]

    def outside_in(self) -> np.ndarray:
        """Return the good rows by size: the shortest content, the longest, the second shortest, and so on."""
        good = self.good
        by_size = good[np.argsort(self.sizes[good], kind="stable")]
        order = np.empty_like(by_size)
        order[::2], order[1::2] = by_size[: (len(by_size) + 1) // 2], by_size[::-1][: len(by_size) // 2]
        return order


def key_contents(source: Source, *, workers: int, cache: StatCache | None = None, trust: bool = True) -> KeyedSamples:
    """Return the key of every sample of `source`; each is read once, by `workers` threads.

    A file whose stamp is in `cache` is not read, unless `trust` is False: then all are read and the cache is updated.
    """
    count, now = len(source), time.time_ns()
    keys, sizes = np.zeros((count, KEY_BYTES), np.uint8), np.zeros(count, np.int64)
    stamps = [_stamp(source, row) for row in range(count)]
    known = cache.find(stamps) if cache and trust else {}
    keys[list(known)] = np.frombuffer(b"".join(known.values()), np.uint8).reshape(-1, KEY_BYTES)
    sizes[list(known)] = [stamp.size for row in known if (stamp := stamps[row])]

    def key_row(row: int) -> None:
        _check_row(source.row(row))
        if row not in known:
            content = source.content(row)
            keys[row] = np.frombuffer(source.key(row, content), np.uint8)
            sizes[row] = sum(map(len, content)) if isinstance(content, tuple | list) else len(content)

    def key_some(begin: int) -> list[BadSample]:
        bad = []
        for row in range(begin, min(begin + KEYED_AT_ONCE, count)):
            fault = attempt(partial(key_row, row), partial(set_aside, source, row))
            if fault:
                keys[row], sizes[row] = 0, 0
                bad.append(fault)
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


def _stamp(source: Source, row: int) -> Stamp | None:
    """Return the stamp of a row; None where the source fails, so that reading the row reports the fault."""
    return attempt(lambda: source.stamp(row), lambda _: None)


def _check_row(row: Row) -> None:
    """Refuse values that the sample table cannot hold, such as file names or JSON texts that are not UTF-8."""
    if SURROGATE.search(row.source):
        raise BadSampleError("the name is not UTF-8; rename the file")
    for name, target in row.targets.items():
        for value in target if isinstance(target, list) else [target]:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise BadSampleError(f"a number beyond 64 bits: the target {name} is {value}; make it a text")
            if isinstance(value, str) and SURROGATE.search(value):
                raise BadSampleError(f"half of a character (a lone surrogate): the target {name} has it; mend it")
