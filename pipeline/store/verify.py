"""Is every byte of a store the one that was written?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store.format import CHECKSUM_BYTES, METADATA_FILE, RECIPE_FILE, SUFFIX, ArraySpec, find_stores
from pipeline.store.metadata import corrupt, read_arrays, read_keys, read_recipe, read_segment_spec
from pipeline.store.scratch import PREFIX
from pipeline.store.segment import Segment, open_segment
from pipeline.store.store import Store
from pipeline.store.suffix import read_suffix


def verify(store: Store, progress: Callable[[Sequence[str]], Iterable[str]] = iter) -> list[str]:
    """Read every segment whole and return its faults, one line each; an empty list means that the store is sound.

    Checked are the recipe, all metadata against the segments' seals, the sizes of all files, the crc32c of every chunk
    and of every sample, the offsets of ragged tensors, the digest of each segment's keys against its name, the files
    of the suffix that the store carries, and that nothing else lies in the store. Memory: one array at a time.
    """
    try:
        recipe = read_recipe(store.path)
        there = _entries(store.path)  # before the segments, of which a writer may commit more meanwhile
        segments = store.segments()
    except StoreError as error:
        return [str(error)]
    faults = [fault for segment in progress(segments) for fault in _faults(store.path / segment, recipe.digest)]
    faults += _faults_of_suffix(store.path)
    inside = {path.relative_to(store.path).parts[0] for path in find_stores(store.path) if path != store.path}
    return faults + list(_strays(store.path, there, {RECIPE_FILE, SUFFIX, *segments, *inside}, "of the store"))


def _faults(path: Path, recipe: str) -> Iterator[str]:
    try:
        segment, _ = open_segment(path, recipe)
        arrays = read_arrays(path, read_segment_spec(path))
        read_keys(path)
    except StoreError as error:
        yield str(error)
        return
    sound = []
    for name, spec in arrays.items():
        try:
            _check_raw(path / name, spec)
            sound.append(name)
        except (CorruptStoreError, OSError) as error:
            yield str(error)
    yield from _wrong_samples(segment, sound)
    yield from _strays(path, _entries(path), {METADATA_FILE, *arrays}, "of the segment")
    for name, spec in arrays.items():
        expected = {METADATA_FILE, *spec.chunk_files}
        yield from _strays(path / name, _entries(path / name), expected, "of the array")


def _faults_of_suffix(store: Path) -> Iterator[str]:
    try:
        read_suffix(store)
    except StoreError as error:
        yield str(error)


def _check_raw(array: Path, spec: ArraySpec) -> None:
    """Raise CorruptStoreError unless a raw chunk matches its checksum; the others were proved as they were unpacked."""
    for name in spec.chunk_files if spec.layout == "raw" else ():
        values = np.memmap(array / name, np.uint8, "r", shape=spec.nbytes)
        with (array / name).open("rb") as file:
            file.seek(spec.nbytes)
            checksum = file.read(CHECKSUM_BYTES)
        if google_crc32c.value(values) != int.from_bytes(checksum, "little"):
            raise corrupt(array / name, "does not match its checksum")


def _wrong_samples(segment: Segment, names: Sequence[str]) -> Iterator[str]:
    for name, tensor in segment.tensors.items():
        wrong = tensor.wrong(np.arange(len(tensor))) if name in names else []
        if wrong:
            yield f"{segment.path / name} has other bytes in {len(wrong)} rows ({wrong[0]}, ...) than were written"


def _entries(folder: Path) -> set[str]:
    """Names in a folder, but for what writers have in hand."""
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(PREFIX)}


def _strays(folder: Path, there: set[str], expected: set[str], what: str) -> Iterator[str]:
    for stray in sorted(there - expected):
        yield f"{folder / stray} is no part {what}; remove it"
