"""Keys of files read before: a file with the same path, size, mtime and inode is not read again.

An SQLite file that may be deleted at any time and shared by processes. A fault in it costs a warning and reading the
files again, never the run.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.data.source import Stamp
from pipeline.keys import KEY_BYTES, content_key

log = logging.getLogger("recycle")

T = TypeVar("T")

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
                "SELECT path, stamp, key FROM files WHERE path BETWEEN ? AND ?", (min(paths), max(paths))
            )
            known = {path: (stamp, key) for path, stamp, key in files if path in paths}
            found = ((place, stamp, known.get(path, ("", b""))) for place, path, stamp in wanted)
            return {
                place: key
                for place, stamp, (of, key) in found
                if of == stamp and isinstance(key, bytes) and len(key) == KEY_BYTES
            }

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
