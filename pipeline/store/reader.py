"""Rows of a store -> one batch, read through memory maps.

B batch, and any further axes as the tensor has them.

A raw chunk file is the array, so a batch is gathered straight from the page cache into its own memory. Maps are opened
when first needed and kept; they hold no file descriptor and no anonymous memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError
from pipeline.store.format import OFFSETS, ArraySpec, read_array_spec, read_segment_spec
from pipeline.store.index import Rows


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one segment, mapped.

    Attributes:
        values: (n, ...), or for a ragged tensor all samples end to end along its ragged axis, which comes first.
        dtype: what the values are once read; `values` may be narrower.
        offsets: (n + 1,) int64 where each sample begins in `values`; None when all have one shape.
        axis: the axis of a sample that was moved first; 0 when all have one shape.
    """

    values: Tensor
    dtype: torch.dtype
    offsets: np.ndarray | None
    axis: int

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def sample(self, row: int) -> Tensor:
        """Return one sample, a view without padding, in its stored dtype."""
        if self.offsets is None:
            return self.values[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]].movedim(0, self.axis)


class Reader:
    """Gathers batches from a store; segments are opened when first needed."""

    def __init__(self, root: Path) -> None:
        """Read the segments under the folder `root`."""
        self._root = root
        self._segments: dict[str, dict[str, StoredTensor]] = {}

    def segment(self, segment: str) -> dict[str, StoredTensor]:
        """Return the tensors of a segment by name, mapped once and kept.

        Raises:
            CorruptStoreError: metadata and chunk files are not those that were written.
        """
        tensors = self._segments.get(segment)
        if tensors is None:
            tensors = self._segments[segment] = open_segment(self._root / segment)
        return tensors

    def gather(self, rows: Rows, pad: Mapping[str, float] | None = None, *, pin: bool = False) -> dict[str, Tensor]:
        """Return the tensors of `rows` by name, each (B, ...), in memory of its own.

        Samples of different shapes are padded on the right to the longest, with `pad[name]` or 0. fp16 and bf16 samples
        in one batch give fp32. Rows that come segment by segment are gathered fastest; `pin` gives page-locked memory.

        Raises:
            CorruptStoreError: a segment is not what was written, or has other tensors than the first one.
        """
        opened = [(self.segment(segment), within, begin) for segment, within, begin in runs(rows)]
        names = opened[0][0].keys() if opened else ()
        for tensors, _, begin in opened:
            if tensors.keys() != names:
                where = self._root / rows.segments[rows.segment[begin]]
                raise CorruptStoreError(f"{where} has tensors {sorted(tensors)}, others {sorted(names)}; encode again")
        return {
            name: _gather(
                [(tensors[name], within, begin) for tensors, within, begin in opened], (pad or {}).get(name, 0), pin
            )
            for name in names
        }


def open_segment(segment: Path) -> dict[str, StoredTensor]:
    """Map the tensors of a segment.

    Raises:
        CorruptStoreError: metadata and chunk files are not those that were written.
    """
    spec = read_segment_spec(segment)
    tensors = {name: _open_tensor(segment / name) for name in spec.tensors}
    for name, tensor in tensors.items():
        if len(tensor) != spec.samples:
            raise CorruptStoreError(
                f"{segment / name} has {len(tensor)} samples, its segment {spec.samples}; encode again"
            )
    return tensors


def _open_tensor(array: Path) -> StoredTensor:
    spec = read_array_spec(array)
    values = _map(array, spec)
    if spec.axis is None:
        return StoredTensor(values, spec.torch_dtype, None, 0)
    where = array.with_name(array.name + OFFSETS)
    offsets_spec = read_array_spec(where)
    offsets = _map(where, offsets_spec).numpy()
    in_order = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) > 0 and offsets[0] == 0
    if not in_order or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise CorruptStoreError(f"{where} does not divide the {len(values)} entries of {array.name}; encode again")
    return StoredTensor(values, spec.torch_dtype, offsets, spec.axis)


def _map(array: Path, spec: ArraySpec) -> Tensor:
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else getattr(torch, spec.stored)
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    # A private mapping: unlike mmap.mmap it keeps no descriptor open, of which a large store would need thousands.
    raw = torch.from_file(str(array / spec.chunk_file), shared=False, size=spec.nbytes, dtype=torch.uint8)
    return raw.view(dtype).view(spec.shape)


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
    batch = torch.empty((n_rows, *shapes.pop()), dtype=dtype, pin_memory=pin)
    for tensor, within, begin in parts:
        _take(tensor.values, within, batch[begin : begin + len(within)])
    return batch


def _take(values: Tensor, within: np.ndarray, out: Tensor) -> None:
    """Copy `values[within]` to `out`; only with mode="clip" does np.take write into `out` directly."""
    if values.dtype != out.dtype:
        out.copy_(torch.from_numpy(np.take(_numpy(values), within, axis=0)).view(values.dtype))
    else:
        np.take(_numpy(values), within, axis=0, out=_numpy(out), mode="clip")


def _numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _gather_padded(
    parts: list[tuple[StoredTensor, np.ndarray, int]], n_rows: int, dtype: torch.dtype, pad: float, pin: bool
) -> Tensor:
    samples = [tensor.sample(row) for tensor, within, _ in parts for row in within.tolist()]
    longest = np.max([sample.shape for sample in samples], axis=0).tolist()
    batch = torch.full((n_rows, *longest), pad, dtype=dtype, pin_memory=pin)
    for row, sample in zip(batch, samples, strict=True):
        row[tuple(slice(length) for length in sample.shape)] = sample
    return batch
