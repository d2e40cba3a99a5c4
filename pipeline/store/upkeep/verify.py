"""Proof that every byte of a store is the one that was written."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import google_crc32c
import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store.format.layout import ArraySpec, find_stores
from pipeline.store.format.metadata import read_arrays, read_recipe, read_segment_spec
from pipeline.store.format.names import ATTACHMENTS, METADATA_FILE, OF_LIBRARY, RECIPE_FILE, corrupt
from pipeline.store.format.segment_files import file_sizes, read_keys
from pipeline.store.local.segment import Segment, open_segment
from pipeline.store.local.segment_cache import SegmentCache
from pipeline.store.local.temporary import PREFIX, temporary_folder
from pipeline.store.store import Store
from pipeline.store.upkeep.attachments import read_attachment


def verify(store: Store, progress: Callable[[Sequence[str]], Iterable[str]] = iter) -> list[str]:
    """Read every segment whole and return its faults, one line each; an empty list means that the store is sound.

    It checks the recipe, all metadata against the segments' seals, the sizes of all files, the crc32c of every chunk
    and of every sample, the offsets of ragged tensors, the digest of each segment's keys against its name, the files
    of the store's attachments, and that the store has no other files. Memory: one array at a time.
    """
    try:
        recipe = read_recipe(store.path).digest  # as it is on disk now
        # Before the segments, of which a writer may commit more meanwhile.
        there = {entry.name for entry in store.path.iterdir() if not entry.name.startswith(PREFIX)}
        segments = store.segments()
    except StoreError as error:
        return [str(error)]
    faults = [fault for segment in progress(segments) for fault in _faults(store, recipe, segment)]
    for name in ATTACHMENTS:
        try:
            read_attachment(store, name)
        except StoreError as error:
            faults.append(str(error))
    inside = {path.relative_to(store.path).parts[0] for path in find_stores(store.path) if path != store.path}
    strays = sorted(there - {RECIPE_FILE, *ATTACHMENTS, *OF_LIBRARY, *segments, *inside})
    return faults + [f"{store.path / stray} is no part of the store; remove it" for stray in strays]


def _faults(store: Store, recipe: str, name: str) -> Iterator[str]:
    path = store.path / name
    with ExitStack() as folders:
        # Chunks in a bucket are fetched anew: those in the cache of a training would prove nothing.
        cache = None
        if not store.files.is_local:
            cache = SegmentCache(folders.enter_context(temporary_folder(store.path)), sys.maxsize)
        try:
            segment = open_segment(path, recipe, cache, store.files)
            arrays = read_arrays(path, read_segment_spec(path))
            read_keys(path)
        except StoreError as error:
            yield str(error)
            return
        sound = []
        for array, spec in arrays.items():
            try:
                if array not in segment.cached:  # else it was proved when it was fetched
                    _check_mappable(path / array, spec)
                sound.append(array)
            except (CorruptStoreError, OSError) as error:
                yield str(error)
        yield from _wrong_samples(segment, sound)
    expected = {f"{array}/{file}" for array, spec in arrays.items() for file in (METADATA_FILE, *spec.chunk_files)}
    for stray in sorted(file_sizes(path).keys() - expected - {METADATA_FILE}):
        yield f"{path / stray} is no part of the segment; remove it"


def _check_mappable(array: Path, spec: ArraySpec) -> None:
    """Raise CorruptStoreError unless the chunk matches its checksum; takes no memory but the page cache's."""
    for file in (array / name for name in spec.chunk_files):
        checksum = np.memmap(file, np.uint8, "r", spec.nbytes).tobytes()
        if google_crc32c.value(np.memmap(file, np.uint8, "r", shape=spec.nbytes)) != int.from_bytes(checksum, "little"):
            raise corrupt(file, "does not match its checksum")


def _wrong_samples(segment: Segment, names: Sequence[str]) -> Iterator[str]:
    for name, tensor in segment.tensors.items():
        wrong = tensor.wrong(np.arange(len(tensor))) if name in names else []
        if wrong:
            yield f"{segment.path / name} has other bytes in {len(wrong)} rows ({wrong[0]}, ...) than were written"
