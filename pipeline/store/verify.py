"""Is every byte of a store the one that was written?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import zarr
from zarr.storage import LocalStore

from pipeline.errors import CorruptStoreError
from pipeline.store.format import KEYS, METADATA_FILE, OFFSETS, read_keys
from pipeline.store.reader import open_segment
from pipeline.store.store import Store


def verify(store: Store) -> list[str]:
    """Read every segment whole and return its faults, one line each; an empty list means that the store is sound.

    Checked are the sizes of all files, the crc32c of every array, the offsets of ragged tensors, the digest of each
    segment's keys against its name, and that nothing else lies in a segment. Memory: one array at a time.
    """
    return [fault for segment in store.segments() for fault in _faults(store.path / segment)]


def _faults(segment: Path) -> Iterator[str]:
    try:
        tensors = open_segment(segment)
        read_keys(segment)
    except CorruptStoreError as error:
        yield str(error)
        return
    ragged = [f"{name}{OFFSETS}" for name, tensor in tensors.items() if tensor.offsets is not None]
    arrays = [KEYS, *tensors, *ragged]
    for name in arrays:
        try:
            zarr.open_array(LocalStore(segment / name, read_only=True), mode="r", zarr_format=3)[...]
        except (ValueError, OSError) as error:
            yield f"{segment / name}: {error}; remove the segment's folder and encode again"
    for stray in sorted({entry.name for entry in segment.iterdir()} - {METADATA_FILE, *arrays}):
        yield f"{segment / stray} is no part of the segment; remove it"
