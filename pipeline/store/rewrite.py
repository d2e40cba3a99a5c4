"""Segments give way to others, without a stored bit of what is kept being changed.

The new segment is committed before the first old one goes. A kill between leaves some samples in two segments, which
readers tolerate, and the old ones are then redundant: the next upkeep removes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import zarr
from zarr.storage import LocalStore

from pipeline.errors import CorruptStoreError
from pipeline.keys import Recipe
from pipeline.store.codecs import Encoded
from pipeline.store.format import METADATA_FILE, SegmentSpec, segment_id
from pipeline.store.index import KeyIndex
from pipeline.store.metadata import read_array_spec, read_arrays, read_keys, read_metadata, read_segment_spec
from pipeline.store.reader import Reader, runs
from pipeline.store.scratch import discard, scratch, sync
from pipeline.store.segment import Segment, StoredTensor, as_numpy, open_segment
from pipeline.store.writer import commit


@dataclass(frozen=True)
class Change:
    """Segments that give way to one with what is kept of them; to none where nothing is.

    Attributes:
        kept: by segment id the rows that are kept, (n,) int64, in their order.
        samples: how many rows go.
        bytes: about what that frees, of the files' sizes.
        forgotten: keys, in hex, that are also taken out of the lists of bad samples.
        elsewhere: other segments that hold every sample of these; proved before anything goes.
    """

    kept: dict[str, np.ndarray]
    samples: int
    bytes: int
    forgotten: frozenset[str] = frozenset()
    elsewhere: tuple[str, ...] = ()


Progress: TypeAlias = Callable[[Sequence[Change]], Iterable[Change]]


def apply(root: Path, recipe: Recipe, changes: Sequence[Change], progress: Progress = iter) -> list[str]:
    """Carry out `changes` on the store at `root` and return the faults that kept some of them from it, one line each.

    Everything that is kept is proved against its checksums first. Memory: one tensor of a new segment at a time, and
    the old segments whole where they are compressed.

    Raises:
        StoreError: the disk refuses; what was not changed yet is as it was.
    """
    faults = []
    for change in progress(changes):
        try:
            _apply(root, recipe, change)
        except CorruptStoreError as error:
            faults.append(str(error))
    return faults


def _apply(root: Path, recipe: Recipe, change: Change) -> None:
    if change.elsewhere:
        _prove(root, list(change.kept), change.elsewhere)
    new = None
    if any(len(rows) for rows in change.kept.values()):
        new = _commit_kept(root, recipe, change)
    for segment in change.kept:
        if segment != new:
            discard(root / segment)


def _prove(root: Path, segments: Sequence[str], elsewhere: Sequence[str]) -> None:
    """Raise unless the segments `elsewhere` hold sound copies of all samples of `segments`."""
    rows = KeyIndex(root, elsewhere).rows(np.concatenate([read_keys(root / segment) for segment in segments]))
    reader = Reader(root)
    for segment, within, _ in runs(rows[np.argsort(rows.segment, kind="stable")]):
        reader.check(segment, within)


def _commit_kept(root: Path, recipe: Recipe, change: Change) -> str:
    """Commit what is kept as one segment, as old as the youngest it is made of, and return its id."""
    keys = np.concatenate([read_keys(root / segment)[rows] for segment, rows in change.kept.items()])
    new = segment_id(keys)
    specs = [read_segment_spec(root / segment) for segment in change.kept]
    bad = tuple(
        key for key in dict.fromkeys(key for spec in specs for key in spec.set_aside) if key not in change.forgotten
    )
    if new in change.kept:
        _reseal(root / new, bad)
        return new
    age = max((root / segment / METADATA_FILE).stat().st_mtime_ns for segment in change.kept)
    parts = [(open_segment(root / segment, recipe.digest)[0], rows) for segment, rows in change.kept.items()]
    for segment, rows in parts:
        segment.check(rows)
    spec = SegmentSpec(recipe.digest, len(keys), specs[0].tensors, bad)
    commit(root, keys, spec, _joined(spec.tensors, parts), recipe.storage)
    open_segment(root / new, recipe.digest)[0].check(np.arange(len(keys)))  # as the disk gives it back
    os.utime(root / new / METADATA_FILE, ns=(age, age))
    return new


def _joined(names: Sequence[str], parts: Sequence[tuple[Segment, np.ndarray]]) -> Iterator[Encoded]:
    for name in names:
        spec = read_array_spec(parts[0][0].path / name)
        tensors = [(segment.tensors[name], rows) for segment, rows in parts]
        entries = [tensor.entries(rows) for tensor, rows in tensors]
        data = np.concatenate(
            [as_numpy(tensor.values)[at].view(spec.stored) for (tensor, _), at in zip(tensors, entries, strict=True)]
        )
        scales = None
        if tensors[0][0].scales is not None:
            scales = _joined_scales([tensor for tensor, _ in tensors], entries)
        offsets = None
        if tensors[0][0].offsets is not None:
            lengths = [np.diff(tensor.offsets)[rows] for tensor, rows in tensors if tensor.offsets is not None]
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        yield Encoded(replace(spec, shape=data.shape), data, offsets, scales)


def _joined_scales(tensors: Sequence[StoredTensor], entries: Sequence[np.ndarray]) -> np.ndarray:
    """Scales go with their entries; those that a whole segment shares stay, and only one segment can have them."""
    scales = [tensor.scales.numpy() for tensor in tensors if tensor.scales is not None]
    if len(scales) == 1 and len(scales[0]) == 1:
        return scales[0]
    return np.concatenate([own[at] for own, at in zip(scales, entries, strict=True)])


def _reseal(segment: Path, bad: tuple[str, ...]) -> None:
    """Replace the list of bad samples of a segment, by the rename of one file: its arrays are not touched."""
    spec = read_segment_spec(segment)
    if bad == spec.set_aside:
        return
    age = (segment / METADATA_FILE).stat().st_mtime_ns
    arrays = {name: read_metadata(segment / name) for name in read_arrays(segment, spec)}
    spec = replace(spec, set_aside=bad)
    sealed = replace(spec, seal=spec.sealed_over(arrays))
    with scratch(segment.parent) as temporary:
        zarr.create_group(LocalStore(temporary), zarr_format=3, attributes=sealed.attributes)
        os.utime(temporary / METADATA_FILE, ns=(age, age))
        sync(temporary / METADATA_FILE)
        (temporary / METADATA_FILE).replace(segment / METADATA_FILE)
        sync(segment)
