"""Replacing segments by others, without changing a stored bit of the samples that are kept.

The new segment is committed before the first old one goes. A kill in between leaves some samples in two segments, which
readers tolerate, and the old ones are then redundant: the next upkeep removes them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import Recipe
from pipeline.store.format.layout import EncodedTensor, segment_id
from pipeline.store.format.metadata import SegmentSpec, read_arrays, read_metadata, read_segment_spec
from pipeline.store.format.names import METADATA_FILE
from pipeline.store.format.segment_files import read_keys
from pipeline.store.local.index import KeyIndex
from pipeline.store.local.reader import Reader, runs
from pipeline.store.local.segment import Segment, open_segment
from pipeline.store.local.stored_tensor import as_numpy
from pipeline.store.local.temporary import discard, sweep, sync, temporary_folder
from pipeline.store.local.writer import commit, write_group
from pipeline.store.store import Store
from pipeline.store.upkeep.plans import Change

Progress: TypeAlias = Callable[[Sequence[Change]], Iterable[Change]]


def apply_changes(store: Store, changes: Sequence[Change], progress: Progress = iter) -> list[str]:
    """Carry out planned changes of a store under `exclusive_access`, and remove what dead writers left.

    Returns the faults, one line each, of segments that could not be changed because their bytes are not those that were
    written; they stay as they are. Memory: one tensor of a new segment at a time, and the old segments whole where they
    are compressed.

    Raises:
        StoreError: the disk refuses; segments that were not changed yet are as they were. Or the store is in a bucket.
    """
    if not store.files.is_local:
        raise StoreError(
            f"{store.where}: segments of a store in a bucket are not removed or merged; "
            "do it on a copy on disk, and upload that"
        )
    faults = []
    for change in progress(changes):
        try:
            _apply(store.path, store.recipe, change)
        except CorruptStoreError as error:
            faults.append(str(error))
    sweep(store.path)
    store.refresh()
    return faults


def _apply(root: Path, recipe: Recipe, change: Change) -> None:
    if change.holders:
        _prove(root, list(change.kept), change.holders)
    new = None
    if any(len(rows) for rows in change.kept.values()):
        new = _commit_kept(root, recipe, change)
    for segment in change.kept:
        if segment != new:
            discard(root / segment)


def _prove(root: Path, segments: Sequence[str], holders: Sequence[str]) -> None:
    """Raise unless the segments `holders` hold sound copies of all samples of `segments`."""
    rows = KeyIndex(root, holders).rows(np.concatenate([read_keys(root / segment) for segment in segments]))
    reader = Reader(root)
    for segment, within, _ in runs(rows[np.argsort(rows.segment, kind="stable")]):
        reader.check(segment, within)


def _commit_kept(root: Path, recipe: Recipe, change: Change) -> str:
    """Commit the kept rows as one segment, as old as the youngest of the replaced ones, and return its id."""
    keys = np.concatenate([read_keys(root / segment)[rows] for segment, rows in change.kept.items()])
    new = segment_id(keys)
    specs = [read_segment_spec(root / segment) for segment in change.kept]
    bad = [key for key in dict.fromkeys(key for spec in specs for key in spec.set_aside) if key not in change.forgotten]
    if new in change.kept:
        _reseal(root / new, bad)
        return new
    age = max((root / segment / METADATA_FILE).stat().st_mtime_ns for segment in change.kept)
    parts = [(open_segment(root / segment, recipe.digest), rows) for segment, rows in change.kept.items()]
    for segment, rows in parts:
        segment.check(rows)
    spec = SegmentSpec.new(recipe, len(keys), specs[0].tensors, bad)
    commit(root, keys, spec, _merged(spec.tensors, parts), recipe.storage)
    open_segment(root / new, recipe.digest).check(np.arange(len(keys)))  # as the disk returns it
    os.utime(root / new / METADATA_FILE, ns=(age, age))
    return new


def _merged(names: Sequence[str], parts: Sequence[tuple[Segment, np.ndarray]]) -> Iterator[EncodedTensor]:
    """Yield the kept rows of each tensor end to end, as stored."""
    for name in names:
        tensors = [(segment.tensors[name], rows) for segment, rows in parts]
        spec = tensors[0][0].spec
        entries = [tensor.entries(rows) for tensor, rows in tensors]
        stored = [as_numpy(tensor.values).view(spec.stored) for tensor, _ in tensors]
        data = np.concatenate([own[at] for own, at in zip(stored, entries, strict=True)])
        beside = {
            suffix: _merged_beside([tensor.beside[suffix].numpy() for tensor, _ in tensors], entries)
            for suffix in spec.codec.beside
        }
        offsets = None
        if spec.axis is not None:
            lengths = np.concatenate([tensor.lengths(rows) for tensor, rows in tensors])
            offsets = np.concatenate([[0], np.cumsum(lengths)])
        yield EncodedTensor(replace(spec, shape=data.shape), data, offsets, beside)


def _merged_beside(arrays: Sequence[np.ndarray], entries: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of the entries; one row that a whole segment shares stays, and only one segment may have it."""
    if len(arrays) == 1 and len(arrays[0]) == 1:
        return arrays[0]
    return np.concatenate([own[at] for own, at in zip(arrays, entries, strict=True)])


def _reseal(segment: Path, bad: Sequence[str]) -> None:
    """Replace the list of bad samples of a segment, by the rename of one file: its arrays are not touched."""
    spec = read_segment_spec(segment)
    if tuple(bad) == spec.set_aside:
        return
    age = (segment / METADATA_FILE).stat().st_mtime_ns
    arrays = {name: read_metadata(segment / name) for name in read_arrays(segment, spec)}
    with temporary_folder(segment.parent) as temporary:
        write_group(temporary, spec.model_copy(update={"set_aside": tuple(bad)}), arrays)
        os.utime(temporary / METADATA_FILE, ns=(age, age))
        sync(temporary / METADATA_FILE)
        (temporary / METADATA_FILE).replace(segment / METADATA_FILE)
        sync(segment)
