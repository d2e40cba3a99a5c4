"""Reading files that anybody may have written: regular files only, of bounded size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.errors import CorruptStoreError

REMEDY = "remove the segment's folder and encode again"


def read_file(where: Path | str, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file; opening anything else may block for ever, or have effects.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is longer than `limit` bytes.
    """
    if not stat.S_ISREG(os.stat(where).st_mode):
        raise OSError(None, "no file", str(where))
    with open(os.open(where, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        data = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return data


def corrupt(where: Path | str, fault: str) -> CorruptStoreError:
    """Return the error for a file or folder `where` that differs from what was written."""
    return CorruptStoreError(f"{where} {fault}; {REMEDY}")


def unreadable(where: Path | str, error: OSError) -> CorruptStoreError:
    """Return the error for a file or folder `where` that cannot be read."""
    return CorruptStoreError(f"{where}: cannot be read ({error.strerror}); {REMEDY}")
