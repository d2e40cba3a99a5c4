"""Reading what anybody may have written."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_file(where: Path | str, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file; to open anything else may wait for ever, or have effects.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is longer than `limit` bytes.
    """
    if not stat.S_ISREG(os.stat(where).st_mode):
        raise OSError(None, "no file", str(where))
    with open(os.open(where, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        text = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(text) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return text


def is_same(value: object, expected: object) -> bool:
    """Compare JSON values; to Python `true`, 1 and 1.0 are equal, to other readers they are not."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(is_same(value[name], expected[name]) for name in expected)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(is_same, value, expected))
    return value == expected
