"""Rows of a store -> one batch, read through memory maps.

B batch, and any further axes as the tensor has them.

A raw chunk file is the array, so a batch is gathered straight from the page cache into its own memory. Maps are opened
when first needed and kept; they hold no file descriptor and no anonymous memory. Compressed arrays are unpacked to
scratch first. Each sample's bytes are checked when they are read for the first time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.codecs import dequantise
from pipeline.store.format import (
    KEYS,
    OFFSETS,
    RECIPE_FILE,
    SCALES,
    SUMS,
    ArraySpec,
    SegmentSpec,
    check_seal,
    corrupt,
    read_array_spec,
    read_recipe,
    read_segment_spec,
    read_small,
    sample_sum,
)
from pipeline.store.index import Rows
from pipeline.store.materialise import Scratch, check_packed, unpack_array

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
        bounds = [(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows.tolist()]
        if self.scales is None:
            flat = as_numpy(self.values)
        else:
            entries = np.concatenate([np.arange(begin, end) for begin, end in bounds])
            flat = as_numpy(self.take(entries))
            ends = np.cumsum([end - begin for begin, end in bounds]).tolist()
            bounds = list(itertools.pairwise([0, *ends]))
        return [np.moveaxis(flat[begin:end], 0, self.axis) for begin, end in bounds]

    def check(self, row: int) -> bool:
        """Tell whether the bytes of a sample are those that were written."""
        entries = slice(row, row + 1) if self.offsets is None else slice(self.offsets[row], self.offsets[row + 1])
        return sample_sum(as_numpy(self.values)[entries]) == int(self.sums[row])

    def _scaled(self, stored: Tensor, entries: np.ndarray | slice) -> Tensor:
        if self.scales is None:
            return stored
        return dequantise(stored, self.scales if len(self.scales) == 1 else self.scales[entries], self.dtype)


@dataclass(frozen=True)
class Segment:
    """The tensors of one segment by name, and which of its samples were checked, (n,) bool."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    checked: np.ndarray = field(repr=False)

    def check(self, rows: np.ndarray) -> None:
        """Raise CorruptStoreError unless `rows` hold the bytes that were written; each row is looked at once."""
        for row in rows[~self.checked[rows]].tolist():
            for name, tensor in self.tensors.items():
                if not tensor.check(row):
                    raise corrupt(self.path / name, f"has other bytes in row {row} than were written")
            self.checked[row] = True


class Reader:
    """Gathers batches from a store; segments are opened when first needed."""

    def __init__(self, root: Path, *, scratch: Scratch | None = None, check: bool = True) -> None:
        """Read the segments under the folder `root`.

        Args:
            root: the store.
            scratch: where compressed arrays are unpacked; None unpacks each into memory, for small stores.
            check: prove the bytes of every sample against their checksum when they are read for the first time.
        """
        self._root, self._scratch, self._check = root, scratch, check
        self._segments: dict[str, Segment] = {}
        self._recipes: dict[Path, str] = {}

    def segment(self, segment: str) -> Segment:
        """Return a segment, opened once and kept.

        Raises:
            CorruptStoreError: metadata and chunk files are not those that were written.
        """
        opened = self._segments.get(segment)
        if opened is None:
            opened = self._segments[segment] = self._open(self._root / segment)
        return opened

    def gather(self, rows: Rows, pad: Mapping[str, float] | None = None, *, pin: bool = False) -> dict[str, Tensor]:
        """Return the tensors of `rows` by name, each (B, ...), in memory of its own.

        Samples of different shapes are padded on the right to the longest, with `pad[name]` or 0. fp16 and bf16 samples
        in one batch give fp32. Rows that come segment by segment are gathered fastest; `pin` gives page-locked memory.

        Raises:
            CorruptStoreError: a segment is not what was written, or has other tensors than the first one.
        """
        opened = [(self.segment(segment), within, begin) for segment, within, begin in runs(rows)]
        names = opened[0][0].tensors.keys() if opened else ()
        for segment, _, _ in opened:
            if segment.tensors.keys() != names:
                raise CorruptStoreError(
                    f"{segment.path} has tensors {sorted(segment.tensors)}, others {sorted(names)}; encode again"
                )
        for name, within, _ in runs(rows):
            self.check(name, within)
        return {
            name: _gather(
                [(segment.tensors[name], within, begin) for segment, within, begin in opened],
                (pad or {}).get(name, 0),
                pin,
            )
            for name in names
        }

    def check(self, segment: str, rows: np.ndarray) -> None:
        """Prove the bytes of some rows of a segment against their checksums, where checks are on.

        Raises:
            CorruptStoreError: they are not those that were written.
        """
        opened = self.segment(segment)
        if self._check:
            opened.check(rows)

    def _open(self, path: Path) -> Segment:
        store = path.parent
        if store not in self._recipes:
            self._recipes[store] = read_recipe(store).digest
        opened, given_up = open_segment(path, self._recipes[store], self._scratch)
        for folder in given_up:  # a mapped file keeps its space on disk
            self._segments = {name: one for name, one in self._segments.items() if Path(name).name != folder.name}
        return opened


def open_segment(path: Path, recipe: str, scratch: Scratch | None = None) -> tuple[Segment, list[Path]]:
    """Map the tensors of a segment of the recipe with the digest `recipe`; also return what scratch gave up for it.

    Raises:
        CorruptStoreError: metadata and chunk files are not those that were written, or belong to another recipe.
        StoreError: what is compressed cannot be unpacked, for want of room.
    """
    spec = read_segment_spec(path)
    if spec.recipe != recipe:
        raise corrupt(path, f"was written under recipe {spec.recipe}, its store's {RECIPE_FILE} is {recipe}")
    specs = {name: read_array_spec(path / name) for name in spec.tensors}
    offsets = [f"{name}{OFFSETS}" for name, one in specs.items() if one.axis is not None]
    scales = [f"{name}{SCALES}" for name, one in specs.items() if one.is_scaled]
    check_seal(path, spec, [KEYS, SUMS, *specs, *offsets, *scales])
    beside = _read_beside(path, spec, offsets, scales)
    packed = {name: one for name, one in specs.items() if one.layout == "zstd" and one.nbytes}
    files, given_up = _unpack(path, recipe, packed, scratch)
    tensors = {}
    for column, (name, one) in enumerate(specs.items()):
        scale = beside.get(f"{name}{SCALES}")
        tensors[name] = StoredTensor(
            _map(path / name, one, files.get(name)),
            one.torch_dtype,
            beside.get(f"{name}{OFFSETS}"),
            one.axis or 0,
            None if scale is None else torch.from_numpy(scale.copy()),
            beside[SUMS][:, column],
        )
        _check_shapes(path / name, tensors[name], spec.samples)
    return Segment(path, tensors, np.zeros(spec.samples, np.bool_)), given_up


def _read_beside(path: Path, spec: SegmentSpec, offsets: Sequence[str], scales: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the checksums of samples, the offsets and the scales, whose types and sizes are fixed."""
    types = {SUMS: "uint32"} | dict.fromkeys(offsets, "int64") | dict.fromkeys(scales, "float32")
    read = {}
    for name, stored in types.items():
        array = read_array_spec(path / name)
        if array.stored != stored or (name == SUMS and array.shape != (spec.samples, len(spec.tensors))):
            raise corrupt(path / name, f"has shape {array.shape} of {array.stored} for {spec.samples} samples")
        read[name] = read_small(path / name, array)
    keys = read_array_spec(path / KEYS).shape
    if keys != (spec.samples, KEY_BYTES):
        raise corrupt(path / KEYS, f"has shape {keys}, expected {(spec.samples, KEY_BYTES)}")
    return read


def _unpack(
    path: Path, recipe: str, packed: Mapping[str, ArraySpec], scratch: Scratch | None
) -> tuple[dict[str, Path], list[Path]]:
    for name, spec in packed.items():
        check_packed(path / name, spec)
    if packed and scratch is not None:
        return scratch.unpack(path, recipe, packed)
    needed = sum(spec.nbytes for spec in packed.values())
    if needed > IN_MEMORY_BYTES:
        raise StoreError(f"{path} unpacks to {needed} bytes, at most {IN_MEMORY_BYTES} without a scratch; give one")
    return {}, []


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
    dtype = torch.uint16 if spec.stored == "uint16" else getattr(torch, spec.stored)
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
        unpack_array(array, spec, plain)
        values = torch.from_numpy(plain)
    return values.view(torch.bfloat16) if spec.dtype == "bfloat16" and not spec.is_scaled else values


def runs(rows: Rows) -> Iterator[tuple[str, np.ndarray, int]]:
    """Divide `rows` into stretches of one segment: its id, the rows within it, and where the stretch begins."""
    if not len(rows):
        return
    begins = [0, *(np.flatnonzero(np.diff(rows.segment)) + 1).tolist(), len(rows)]
    for begin, end in itertools.pairwise(begins):
        yield rows.segments[rows.segment[begin]], rows.row[begin:end], begin


def _gather(parts: list[tuple[StoredTensor, np.ndarray, int]], pad: float, pin: bool) -> Tensor:
    tensors = [tensor for tensor, _, _ in parts]
    n_rows = parts[-1][2] + len(parts[-1][1])
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    shapes = {tensor.values.shape[1:] for tensor in tensors}
    if len(shapes) > 1 or any(tensor.offsets is not None for tensor in tensors):
        return _gather_padded(parts, n_rows, dtype, pad, pin)
    batch = _new_batch((n_rows, *shapes.pop()), dtype, pin)
    for tensor, within, begin in parts:
        out = batch[begin : begin + len(within)]
        if tensor.values.dtype == dtype:  # only with mode="clip" does np.take write into `out` directly
            np.take(as_numpy(tensor.values), within, axis=0, out=as_numpy(out), mode="clip")
        else:
            out.copy_(tensor.take(within))
    return batch


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return the tensor as an array on the same memory; numpy has no bfloat16 and gets its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _gather_padded(
    parts: list[tuple[StoredTensor, np.ndarray, int]], n_rows: int, dtype: torch.dtype, pad: float, pin: bool
) -> Tensor:
    samples = [(tensor.dtype, sample) for tensor, within, _ in parts for sample in tensor.samples(within)]
    longest = tuple(map(max, zip(*(sample.shape for _, sample in samples), strict=True)))
    batch = _new_batch((n_rows, *longest), dtype, pin)
    filler = as_numpy(torch.tensor(pad, dtype=dtype))
    for row, (own, sample) in zip(as_numpy(batch), samples, strict=True):
        if sample.shape != longest:
            row[_outside(sample.shape, longest)] = filler
        row[tuple(map(slice, sample.shape))] = sample if own == dtype else _converted(sample, own, dtype)
    return batch


def _new_batch(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    except (RuntimeError, MemoryError) as error:
        raise StoreError(f"a batch of shape {shape} in {dtype} finds no memory; make batches smaller") from error


def _outside(shape: tuple[int, ...], longest: tuple[int, ...]) -> tuple[slice, ...]:
    """What `shape` leaves of `longest`: its tail along the one axis that is shorter, or everything for several."""
    shorter = [axis for axis, (own, most) in enumerate(zip(shape, longest, strict=True)) if own < most]
    if len(shorter) > 1:
        return ()
    return (*(slice(None) for _ in range(shorter[0])), slice(shape[shorter[0]], None))


def _converted(sample: np.ndarray, own: torch.dtype, dtype: torch.dtype) -> np.ndarray:
    return as_numpy(torch.from_numpy(np.ascontiguousarray(sample)).view(own).to(dtype))
