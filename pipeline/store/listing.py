"""What files a segment has: those in its folder or, of one that lies elsewhere, those that a listing named.

A segment that lies elsewhere has a folder too, with its small files, and beside them the listing of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LISTING_FILE = "remote.json"


class Listed(NamedTuple):
    """What a listing says of a file: its size in bytes, and a tag that changes with its bytes."""

    size: int
    tag: str


def read_listing(segment: Path) -> dict[str, Listed]:
    """Return what was listed of a segment that lies elsewhere; nothing of others."""
    try:
        raw = json.loads((segment / LISTING_FILE).read_text(encoding="utf-8"))
        return {name: Listed(*listed) for name, listed in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_listing(segment: Path, files: Mapping[str, Listed]) -> None:
    """Keep what was listed of a segment in its folder."""
    (segment / LISTING_FILE).write_text(json.dumps(dict(sorted(files.items()))), encoding="utf-8")


def file_sizes(segment: Path) -> dict[str, int]:
    """Return the sizes of a segment's files in bytes, by their paths within it."""
    listed = read_listing(segment)
    if listed:
        return {name: file.size for name, file in listed.items()}
    found = (path for path in segment.rglob("*") if path.is_file())
    return {path.relative_to(segment).as_posix(): path.stat().st_size for path in found}


def segment_nbytes(segment: Path) -> int:
    """Return the size of a segment's files in bytes."""
    return sum(file_sizes(segment).values())
