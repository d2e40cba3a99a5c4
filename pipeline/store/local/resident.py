"""Samples of a store held whole in an accelerator's memory: where they fit, no epoch waits for the host.

N samples held, B batch, L length along the ragged axis, E entries of all samples end to end.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.store.format.names import SHAPE_PREFIX
from pipeline.store.local.index import Rows
from pipeline.store.local.reader import Reader, runs
from pipeline.store.local.stored_tensor import StoredTensor

Parts: TypeAlias = Sequence[tuple[StoredTensor, np.ndarray]]
"""The parts of one tensor, one per segment, each with its rows to hold, (n,) int64."""


@dataclass(frozen=True)
class ResidentTensor:
    """One tensor of all held samples.

    Attributes:
        values: (N, ...), or (E, ...) for a ragged tensor.
        axis: its ragged axis, if any.
        lengths: those of the samples along the ragged axis, (N,), on the host.
        starts: where samples begin in `values`, (N,), on the device.
    """

    values: Tensor
    axis: int | None = None
    lengths: np.ndarray | None = None
    starts: Tensor | None = None

    def gather(self, index: np.ndarray, pad: float) -> Tensor:
        """Return the samples `index` (B,), (B, ...), padded on the right to the longest."""
        index_B = torch.from_numpy(index).to(self.values.device, non_blocking=True)
        if self.starts is None or self.lengths is None or self.axis is None:
            return self.values.index_select(0, index_B)
        lengths = self.lengths[index]  # on the host, so that the shape of the batch needs no wait for the device
        longest = int(lengths.max(initial=0))
        lengths_B = torch.from_numpy(lengths).to(self.values.device, non_blocking=True)
        steps_L = torch.arange(longest, device=self.values.device)
        outside_BL = steps_L >= lengths_B[:, None]
        entry_BL = (self.starts[index_B][:, None] + steps_L).masked_fill(outside_BL, 0)
        if not len(self.values):
            batch = self.values.new_full((len(index), longest, *self.values.shape[1:]), pad)
        else:
            batch = self.values.index_select(0, entry_BL.flatten()).view(*entry_BL.shape, *self.values.shape[1:])
        outside = outside_BL.reshape(*outside_BL.shape, *(1 for _ in self.values.shape[1:]))
        return batch.masked_fill_(outside, pad).movedim(1, self.axis + 1)


class Resident:
    """Gathers batches as `Reader` does, from samples that were copied to a device once."""

    def __init__(self, reader: Reader, rows: Rows, device: torch.device) -> None:
        """Copy the samples `rows` to `device`. Memory on the host: one segment at a time."""
        self._segments = rows.segments
        self._codes, first = np.unique(rows.codes, return_index=True)
        self._tensors: dict[str, ResidentTensor] = {}
        for name, parts in _parts(reader, rows[first]).items():
            # Shapes of inputs are needed on the host, to make batches of their shape.
            home = torch.device("cpu") if name.startswith(SHAPE_PREFIX) else device
            self._tensors[name] = _allocate(name, parts, home)
        filled = dict.fromkeys(self._tensors, 0)
        for segment, within, _ in runs(rows[first]):
            reader.check(segment, within)
            tensors = reader.segment(segment).tensors
            for name, held in self._tensors.items():
                own = _rows_of(tensors[name], within, held.axis)
                held.values[filled[name] : filled[name] + len(own)].copy_(own)
                filled[name] += len(own)

    @staticmethod
    def nbytes(reader: Reader, rows: Rows) -> int:
        """Return how many bytes of device memory the samples `rows` need."""
        _, first = np.unique(rows.codes, return_index=True)
        meta = torch.device("meta")
        return sum(_allocate(name, parts, meta).values.nbytes for name, parts in _parts(reader, rows[first]).items())

    def gather(self, rows: Rows, pad: Mapping[str, float] | None = None, *, pin: bool = False) -> dict[str, Tensor]:
        """Return the tensors of `rows` by name, each (B, ...), on the device; `pin` is ignored.

        Raises:
            StoreError: a sample is not among those that are held.
        """
        wanted = rows.codes
        index = np.searchsorted(self._codes, wanted)
        are_held = rows.segments == self._segments and index.max(initial=-1) < len(self._codes)
        if not are_held or not np.array_equal(self._codes[index], wanted):
            raise StoreError("some samples are not held on the device; give their keys when the source is made")
        return {name: held.gather(index, (pad or {}).get(name, 0)) for name, held in self._tensors.items()}


def _parts(reader: Reader, rows: Rows) -> dict[str, Parts]:
    opened = [(reader.outline(segment), within) for segment, within, _ in runs(rows)]
    names = list(opened[0][0].tensors) if opened else []
    return {name: [(segment.tensors[name], within) for segment, within in opened] for name in names}


def _allocate(name: str, parts: Parts, device: torch.device) -> ResidentTensor:
    tensors = [tensor for tensor, _ in parts]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    axes = {tensor.spec.axis for tensor in tensors if tensor.spec.axis is not None}
    fixed = np.unique([tensor.spec.entry for tensor in tensors if tensor.offsets is None], axis=0)
    if len(fixed) > 1:
        axes |= set(np.flatnonzero((fixed != fixed[0]).any(axis=0)).tolist())
    if not axes:
        shape = (sum(len(within) for _, within in parts), *fixed[0].astype(int).tolist())
        return ResidentTensor(torch.empty(shape, dtype=dtype, device=device))
    if len(axes) > 1:
        raise StoreError(f"{name} is ragged in axes {sorted(axes)}; set residency to host, which pads any axis")
    axis = axes.pop()
    lengths = np.concatenate([_lengths(tensor, within, axis) for tensor, within in parts])
    first = tensors[0].spec.entry
    rest = first if tensors[0].offsets is not None else first[:axis] + first[axis + 1 :]
    values = torch.empty((int(lengths.sum()), *rest), dtype=dtype, device=device)
    return ResidentTensor(values, axis, lengths, torch.from_numpy(np.cumsum(lengths) - lengths).to(device))


def _rows_of(tensor: StoredTensor, within: np.ndarray, axis: int | None) -> Tensor:
    """Return the samples to hold of a segment, in the order of its rows; a whole segment is not copied on the host."""
    if axis is not None:
        return torch.cat([tensor.sample(row).movedim(axis, 0) for row in within.tolist()])
    if len(within) == len(tensor) and tensor.spec.codec.is_lossless:
        return tensor.values
    return tensor.take(within)


def _lengths(tensor: StoredTensor, within: np.ndarray, axis: int) -> np.ndarray:
    if tensor.offsets is None:
        return np.full(len(within), tensor.spec.entry[axis], np.int64)
    return tensor.lengths(within)
