"""Files of a segment: chunks, sizes and checksums; and the listing of those of a segment in a bucket.

All functions raise CorruptStoreError for bytes that are not those written. A segment in a bucket is mirrored in a
folder, which holds its small files and the listing of all of them.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
from pydantic import TypeAdapter

from pipeline.errors import CorruptStoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.format import names
from pipeline.store.format.layout import ArraySpec, segment_id
from pipeline.store.format.names import REMEDY, corrupt, read_file, unreadable

LISTING_FILE = "remote.json"


class ListedFile(NamedTuple):
    """A file in a listing: its size in bytes, and a tag that changes with its bytes."""

    size: int
    tag: str


_LISTING = TypeAdapter(dict[str, ListedFile])


def read_chunk(where: Path) -> np.ndarray:
    """Return what a chunk file holds, (bytes,) uint8, once its checksum is proved."""
    try:
        raw = read_file(where)
    except OSError as error:
        raise unreadable(where, error) from error
    values = np.frombuffer(raw, np.uint8, max(0, len(raw) - names.CHECKSUM_BYTES))
    if google_crc32c.value(values) != int.from_bytes(raw[len(values) :], "little"):
        raise corrupt(where, "does not match its checksum")
    return values


def check_chunks(array: Path, spec: ArraySpec, sizes: Mapping[str, int]) -> None:
    """Prove by the sizes of an array's chunk files, in bytes by name, that it can hold what its metadata claims.

    To be called before memory or disk is taken for an array.
    """
    if len(sizes) != spec.chunks:  # a shape may claim anything: count before naming each
        raise corrupt(array, f"has {len(sizes)} chunk files, shape {spec.shape} of {spec.stored} needs {spec.chunks}")
    for name in spec.chunk_files:
        if name not in sizes:
            raise corrupt(array / name, "is not there")
        size, needed = sizes[name], spec.nbytes + names.CHECKSUM_BYTES
        if spec.codec.is_mappable and size != needed:
            raise corrupt(array / name, f"has {size} bytes, shape {spec.shape} of {spec.stored} needs {needed}")
        if spec.chunk_nbytes > names.MAX_RATIO * size:
            raise corrupt(array / name, f"has {size} bytes for {spec.chunk_nbytes}, beyond what compresses so well")


def chunk_sizes(array: Path) -> dict[str, int]:
    """Return the sizes of the chunk files in the folder of an array, in bytes, by name."""
    sizes = {}
    try:
        for entry in os.scandir(array):
            if not entry.name.startswith(f"c{names.CHUNK_SEPARATOR}"):
                continue
            where, found = array / entry.name, entry.stat()
            if not stat.S_ISREG(found.st_mode):
                raise corrupt(where, "is no file")
            if found.st_size > names.SPARSE_ABOVE and found.st_blocks * 512 < found.st_size // 64:
                raise corrupt(where, f"has {found.st_size} bytes, of which {found.st_blocks * 512} are on disk")
            sizes[entry.name] = found.st_size
    except OSError as error:
        raise unreadable(array, error) from error
    return sizes


def read_small_array(array: Path, spec: ArraySpec) -> np.ndarray:
    """Return a raw array whole, in its stored type, once its checksum is proved; for those that are small."""
    if not spec.codec.is_mappable or spec.nbytes > names.MAX_BESIDE_BYTES:
        raise corrupt(
            array, f"has {spec.nbytes} bytes in codec {spec.codec.name}, expected raw and {names.MAX_BESIDE_BYTES}"
        )
    if not spec.nbytes:
        return np.empty(spec.shape, spec.stored)
    values = read_chunk(array / spec.chunk_files[0])
    return values.view(np.dtype(spec.stored).newbyteorder("<")).reshape(spec.shape)


def read_keys(segment: Path) -> np.ndarray:
    """Return a segment's sample keys (n, 16) uint8, proved against the segment's id, so that no metadata is needed."""
    # Strings: with thousands of segments, paths take longer than reading.
    where = f"{segment}/{names.KEYS}/c.0.0"
    try:
        raw = read_file(where, names.MAX_BESIDE_BYTES)
    except (OSError, ValueError) as error:
        raise CorruptStoreError(f"{where}: cannot be read ({error}); {REMEDY}") from error
    if len(raw) % KEY_BYTES != names.CHECKSUM_BYTES or len(raw) == names.CHECKSUM_BYTES:
        raise CorruptStoreError(f"{where} has {len(raw)} bytes, which hold no whole number of keys; {REMEDY}")
    keys = np.frombuffer(raw, np.uint8, len(raw) - names.CHECKSUM_BYTES).reshape(-1, KEY_BYTES)
    if segment_id(keys) != segment.name:
        raise corrupt(segment, f"holds the samples of segment {segment_id(keys)}")
    return keys


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
