"""Sizes of a segment's files: those in its folder or, of a segment in a bucket, those that a listing named.

A segment in a bucket is mirrored in a folder, which holds its small files and the listing of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

LISTING_FILE = "remote.json"


class ListedFile(NamedTuple):
    """A file in a listing: its size in bytes, and a tag that changes with its bytes."""

    size: int
    tag: str


_LISTING = TypeAdapter(dict[str, ListedFile])


def read_listing(segment: Path) -> dict[str, ListedFile]:
    """Return the listing of a mirrored segment; nothing for others."""
    try:
        return _LISTING.validate_json((segment / LISTING_FILE).read_bytes(), strict=True)
    except (OSError, ValueError):
        return {}


def write_listing(segment: Path, files: Mapping[str, ListedFile]) -> None:
    """Write the listing of a segment to its folder."""
    (segment / LISTING_FILE).write_text(json.dumps(dict(sorted(files.items()))), encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files of a folder, mirrored or not, in bytes, by their paths within it."""
    listed = read_listing(folder)
    if listed:
        return {name: file.size for name, file in listed.items()}
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def folder_nbytes(folder: Path) -> int:
    """Return the size of a folder's files in bytes."""
    return sum(file_sizes(folder).values())
