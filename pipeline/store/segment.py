"""One segment, mapped: its tensors, sample by sample, and the proof of their bytes.

A raw chunk file is the array, so that its memory map is the tensor: no file descriptor is held, and no memory but the
page cache's. What is compressed or lies elsewhere is brought to scratch first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.codecs import dequantise
from pipeline.store.format import KEYS, OFFSETS, RECIPE_FILE, SCALES, SUMS, ArraySpec, SegmentSpec, sample_sum
from pipeline.store.materialise import Scratch, unpack_array
from pipeline.store.metadata import (
    check_chunks,
    chunk_sizes,
    corrupt,
    read_arrays,
    read_chunk,
    read_segment_spec,
    read_small,
)
from pipeline.store.remote import Remote

BESIDE = (OFFSETS, SCALES)
IN_MEMORY_BYTES = 4 << 30
"""Size that the compressed arrays of one segment may unpack to where there is no scratch."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one segment, mapped.

    Attributes:
        values: (n, ...), or for a ragged tensor all samples end to end along its ragged axis, which comes first.
        dtype: what the values are once read; `values` may be narrower.
        offsets: (n + 1,) int64 where each sample begins in `values`; None when all have one shape.
        axis: the axis of a sample that was moved first; 0 when all have one shape.
        scales: fp32, broadcastable against int8 `values`, which are to be multiplied by them; None otherwise.
        sums: (n,) uint32, crc32c of each sample's bytes in `values`.
    """

    values: Tensor
    dtype: torch.dtype
    offsets: np.ndarray | None
    axis: int
    scales: Tensor | None
    sums: np.ndarray

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, entries: np.ndarray) -> Tensor:
        """Return entries of the first axis, (B, ...): samples, where all have one shape."""
        stored = torch.from_numpy(np.take(as_numpy(self.values), entries, axis=0)).view(self.values.dtype)
        return self._scaled(stored, entries)

    def sample(self, row: int) -> Tensor:
        """Return one sample without padding: a view in its stored dtype, or its scaled values."""
        if self.offsets is None:
            return self._scaled(self.values[row : row + 1], slice(row, row + 1))[0]
        entries = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self._scaled(self.values[entries], entries).movedim(0, self.axis)

    def samples(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return samples without padding, views where no scale is applied; numpy has no bfloat16 and gets its bits."""
        if self.offsets is None:
            return list(as_numpy(self.take(rows))) if self.scales is not None else list(as_numpy(self.values)[rows])
        bounds = self._bounds(rows, self.offsets)
        if self.scales is None:
            flat = as_numpy(self.values)
        else:
            flat = as_numpy(self.take(self.entries(rows)))
            ends = np.cumsum([end - begin for begin, end in bounds]).tolist()
            bounds = list(itertools.pairwise([0, *ends]))
        samples = [flat[begin:end] for begin, end in bounds]
        return [np.moveaxis(sample, 0, self.axis) for sample in samples] if self.axis else samples

    def entries(self, rows: np.ndarray) -> np.ndarray:
        """Return the entries of the first axis that are the samples `rows`, in their order."""
        if self.offsets is None:
            return rows
        ranges = [np.arange(begin, end) for begin, end in self._bounds(rows, self.offsets)]
        return np.concatenate([np.empty(0, np.int64), *ranges])

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the bytes of samples in `values`, (B,) int64."""
        entry = self.values[:1].nbytes if len(self.values) else 0
        lengths = np.ones(len(rows), np.int64) if self.offsets is None else np.diff(self.offsets)[rows]
        sizes: np.ndarray = lengths * entry
        return sizes

    def wrong(self, rows: np.ndarray) -> list[int]:
        """Return those of `rows` whose bytes are not those that were written."""
        stored, expected = as_numpy(self.values), self.sums[rows].tolist()
        bounds = self._bounds(rows, np.arange(len(self) + 1) if self.offsets is None else self.offsets)
        found = (sample_sum(stored[begin:end]) for begin, end in bounds)
        return [row for row, one, other in zip(rows.tolist(), found, expected, strict=True) if one != other]

    def _bounds(self, rows: np.ndarray, offsets: np.ndarray) -> list[tuple[int, int]]:
        return list(zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True))

    def _scaled(self, stored: Tensor, entries: np.ndarray | slice) -> Tensor:
        if self.scales is None:
            return stored
        return dequantise(stored, self.scales if len(self.scales) == 1 else self.scales[entries], self.dtype)


@dataclass
class Segment:
    """The tensors of one segment by name, and what is known of its samples.

    Attributes:
        path: its folder; of one that lies elsewhere, the mirror's.
        tensors: mapped; of an outline, on torch's meta device: shapes without values.
        arrays: how they are stored.
        brought: those that are mapped from scratch, because they are compressed or lie elsewhere.
        place: where in a scratch they lie; bytes that differ have places that differ.
        checked: which samples were checked, (n,) bool.
        left: how many were not.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    arrays: Mapping[str, ArraySpec] = field(repr=False)
    brought: Mapping[str, ArraySpec] = field(repr=False)
    place: Path
    checked: np.ndarray = field(repr=False)
    left: int

    @property
    def nbytes(self) -> int:
        """What its tensors take in memory maps, in bytes: all of them or none are brought."""
        return sum(spec.nbytes for spec in self.arrays.values())

    def check(self, rows: np.ndarray) -> None:
        """Raise CorruptStoreError unless `rows` hold the bytes that were written; each row is looked at once."""
        if not self.left:
            return
        rows = rows[~self.checked[rows]]
        for name, tensor in self.tensors.items():
            if wrong := tensor.wrong(rows):
                raise corrupt(self.path / name, f"has other bytes in row {wrong[0]} than were written")
        self.checked[rows] = True
        self.left = int((~self.checked).sum())


def outline_segment(path: Path, recipe: str, remote: Remote | None = None) -> Segment:
    """Return a segment of the recipe with the digest `recipe`, all but the values of its tensors.

    With `remote`, `path` is the mirror of one that lies there.

    Raises:
        CorruptStoreError: metadata and chunk files are not those that were written, or belong to another recipe.
    """
    spec = read_segment_spec(path)
    if spec.recipe != recipe:
        raise corrupt(path, f"was written under recipe {spec.recipe}, its store's {RECIPE_FILE} is {recipe}")
    arrays = read_arrays(path, spec)
    for name, one in arrays.items():
        elsewhere = remote is not None and name in spec.tensors
        check_chunks(path / name, one, remote.sizes(path / name) if remote and elsewhere else chunk_sizes(path / name))
    beside, tensors = _read_beside(path, spec, arrays), {}
    for column, name in enumerate(spec.tensors):
        one, scale = arrays[name], beside.get(f"{name}{SCALES}")
        tensors[name] = StoredTensor(
            typed(torch.empty(one.shape, dtype=_stored_dtype(one), device="meta"), one),
            one.torch_dtype,
            beside.get(f"{name}{OFFSETS}"),
            one.axis or 0,
            None if scale is None else torch.from_numpy(scale.copy()),
            beside[SUMS][:, column],
        )
        _check_shapes(path / name, tensors[name], spec.samples)
    own = {name: arrays[name] for name in spec.tensors}
    brought = {name: one for name, one in own.items() if one.nbytes and (remote is not None or one.layout == "zstd")}
    place = Path(recipe, f"{path.name}-{google_crc32c.value(np.ascontiguousarray(beside[SUMS])):08x}")
    return Segment(path, tensors, own, brought, place, np.zeros(spec.samples, np.bool_), spec.samples)


def open_segment(
    path: Path, recipe: str, scratch: Scratch | None = None, remote: Remote | None = None
) -> tuple[Segment, list[Path]]:
    """Return what `map_segment` makes of `outline_segment`; raises as these do."""
    return map_segment(outline_segment(path, recipe, remote), scratch, remote)


def map_segment(
    outline: Segment, scratch: Scratch | None = None, remote: Remote | None = None
) -> tuple[Segment, list[Path]]:
    """Return a segment with its tensors mapped, none of its samples checked, and what scratch gave up for it.

    Raises:
        StoreError: what is compressed or lies elsewhere cannot be brought here, for want of room or of a server.
    """
    files, given_up = bring(outline, scratch, remote)
    try:
        values = {name: _map(outline.path / name, spec, files.get(name)) for name, spec in outline.arrays.items()}
    except StoreError:
        if all(file.exists() for file in files.values()):
            raise
        return map_segment(outline, scratch, remote)  # another process gave them up in between
    tensors = {name: replace(tensor, values=values[name]) for name, tensor in outline.tensors.items()}
    unchecked = np.zeros_like(outline.checked)
    return replace(outline, tensors=tensors, checked=unchecked, left=len(unchecked)), given_up


def bring(segment: Segment, scratch: Scratch | None, remote: Remote | None) -> tuple[dict[str, Path], list[Path]]:
    """Return the files in scratch of what a segment has `brought` there, and what scratch gave up; none without one.

    Raises:
        StoreError: as `map_segment`.
    """

    def fill(name: str, out: np.ndarray) -> None:
        array, spec = segment.path / name, segment.arrays[name]
        if spec.layout == "zstd":
            unpack_array(array, spec, out, read_chunk if remote is None else remote.read)
        elif remote is not None:
            remote.copy(array / spec.chunk_files[0], out.reshape(-1).view(np.uint8))

    if segment.brought and scratch is not None:
        return scratch.bring(segment.place, segment.brought, fill)
    if segment.brought and (segment.nbytes > IN_MEMORY_BYTES or remote is not None):
        raise StoreError(
            f"{segment.path} takes {segment.nbytes} bytes, at most {IN_MEMORY_BYTES} of a local store without "
            "a scratch; give one"
        )
    return {}, []


def _read_beside(path: Path, spec: SegmentSpec, arrays: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Read the checksums of samples, the offsets and the scales, whose types and sizes are fixed."""
    types = {SUMS: "uint32"}
    types |= {name: "int64" if name.endswith(OFFSETS) else "float32" for name in arrays if name.endswith(BESIDE)}
    read = {}
    for name, stored in types.items():
        array = arrays[name]
        if array.stored != stored or (name == SUMS and array.shape != (spec.samples, len(spec.tensors))):
            raise corrupt(path / name, f"has shape {array.shape} of {array.stored} for {spec.samples} samples")
        read[name] = read_small(path / name, array)
    if arrays[KEYS] != ArraySpec((spec.samples, KEY_BYTES), "uint8", "uint8"):
        raise corrupt(path / KEYS, f"is {arrays[KEYS]}, expected raw uint8 of shape {(spec.samples, KEY_BYTES)}")
    return read


def _check_shapes(array: Path, tensor: StoredTensor, samples: int) -> None:
    offsets, scales, entries = tensor.offsets, tensor.scales, len(tensor.values)
    if offsets is not None:
        in_order = offsets.ndim == 1 and len(offsets) > 0 and offsets[0] == 0
        if not in_order or offsets[-1] != entries or (offsets[1:] < offsets[:-1]).any():
            raise CorruptStoreError(f"{array}{OFFSETS} does not divide the {entries} entries of {array.name}")
    if len(tensor) != samples:
        raise CorruptStoreError(f"{array} has {len(tensor)} samples, its segment {samples}; encode again")
    if scales is not None:
        axes = zip(scales.shape, tensor.values.shape, strict=False)
        if scales.ndim != tensor.values.ndim or any(scale not in (1, length) for scale, length in axes):
            raise CorruptStoreError(
                f"{array}{SCALES} has shape {tuple(scales.shape)}, its values {tuple(tensor.values.shape)}"
            )


def _map(array: Path, spec: ArraySpec, unpacked: Path | None) -> Tensor:
    dtype = _stored_dtype(spec)
    if not spec.nbytes:
        values = torch.empty(spec.shape, dtype=dtype)
    elif spec.layout == "raw" or unpacked is not None:
        # A private mapping: unlike mmap.mmap it keeps no descriptor open, of which a large store would need thousands.
        file = array / spec.chunk_files[0] if unpacked is None else unpacked
        try:
            raw = torch.from_file(str(file), shared=False, size=spec.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise StoreError(f"{file}: cannot be mapped ({error}); look at its permissions") from error
        values = raw.view(dtype).view(spec.shape)
    else:
        try:
            plain = np.empty(spec.shape, spec.stored)
        except MemoryError as error:
            raise StoreError(f"{array} unpacks to {spec.nbytes} bytes; give a scratch on disk") from error
        unpack_array(array, spec, plain, read_chunk)
        values = torch.from_numpy(plain)
    return typed(values, spec)


def _stored_dtype(spec: ArraySpec) -> torch.dtype:
    return torch.uint16 if spec.stored == "uint16" else getattr(torch, spec.stored)


def typed(values: Tensor, spec: ArraySpec) -> Tensor:
    """Return what is stored as `spec` says in the type that it means; zarr has no bfloat16 and holds its bits."""
    return values.view(torch.bfloat16) if spec.dtype == "bfloat16" and not spec.is_scaled else values


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return the tensor as an array on the same memory; numpy has no bfloat16 and gets its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
