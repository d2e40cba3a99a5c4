"""One tensor of one segment: samples by their rows, decoded, and the proof of their bytes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.store.format.layout import ArraySpec, sample_bounds, sample_sums
from pipeline.store.format.values import encode


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one segment, mapped.

    Attributes:
        values: (n, ...), or for a ragged tensor all samples end to end along its ragged axis, which comes first.
            Of a codec that is not lossless these are the stored numbers.
        spec: how it is stored.
        offsets: (n + 1,) int64 where each sample begins in `values`; None when all have one shape.
        beside: the codec's arrays by suffix, broadcastable against `values`.
        sums: (n,) uint32, crc32c of each sample's bytes in `values`.
    """

    values: Tensor
    spec: ArraySpec
    offsets: np.ndarray | None
    beside: Mapping[str, Tensor]
    sums: np.ndarray

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values once read."""
        return getattr(torch, self.spec.dtype)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, entries: np.ndarray) -> Tensor:
        """Return entries of the first axis, (B, ...): samples, where all have one shape."""
        stored = torch.from_numpy(np.take(as_numpy(self.values), entries, axis=0)).view(self.values.dtype)
        return self._decoded(stored, entries)

    def sample(self, row: int) -> Tensor:
        """Return one sample without padding, in `dtype`: a view where it is stored as it is."""
        ((begin, end),) = sample_bounds(np.array([row]), self.offsets)
        entries = slice(begin, end)
        sample = self._decoded(self.values[entries], entries).to(self.dtype)
        return sample[0] if self.spec.axis is None else sample.movedim(0, self.spec.axis)

    def samples(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return samples without padding, views where the codec is lossless; bfloat16 as its bits, as int16."""
        if self.offsets is None:
            return list(as_numpy(self.values)[rows] if self.spec.codec.is_lossless else as_numpy(self.take(rows)))
        bounds = sample_bounds(rows, self.offsets)
        if self.spec.codec.is_lossless:
            flat = as_numpy(self.values)
        else:
            flat = as_numpy(self.take(self.entries(rows)))
            ends = np.cumsum([end - begin for begin, end in bounds]).tolist()
            bounds = list(itertools.pairwise([0, *ends]))
        samples = [flat[begin:end] for begin, end in bounds]
        return [np.moveaxis(sample, 0, self.spec.axis) for sample in samples] if self.spec.axis else samples

    def entries(self, rows: np.ndarray) -> np.ndarray:
        """Return the entries of the first axis that are the samples `rows`, in their order."""
        if self.offsets is None:
            return rows
        ranges = [np.arange(begin, end) for begin, end in sample_bounds(rows, self.offsets)]
        return np.concatenate([np.empty(0, np.int64), *ranges])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of entries of each sample, (B,) int64."""
        lengths: np.ndarray = np.ones(len(rows), np.int64) if self.offsets is None else np.diff(self.offsets)[rows]
        return lengths

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the bytes of samples in `values`, (B,) int64."""
        return self.lengths(rows) * (self.values[:1].nbytes if len(self.values) else 0)

    def wrong(self, rows: np.ndarray) -> list[int]:
        """Return those of `rows` whose bytes are not those that were written."""
        found = sample_sums(as_numpy(self.values), sample_bounds(rows, self.offsets))
        expected = self.sums[rows].tolist()
        return [row for row, one, other in zip(rows.tolist(), found, expected, strict=True) if one != other]

    def _decoded(self, stored: Tensor, entries: np.ndarray | slice) -> Tensor:
        if self.spec.codec.is_lossless:
            return stored
        beside = {suffix: one if len(one) == 1 else one[entries] for suffix, one in self.beside.items()}
        return self.spec.codec.decode(stored, beside, self.dtype, self.spec.entry)


def round_trip(name: str, samples: Sequence[Tensor], storage: str) -> tuple[list[Tensor], int]:
    """Return the samples of a tensor as they would be read from a segment in `storage`, and their bytes on disk.

    Raises:
        StoreError: their shapes, dtypes or range cannot be stored.
    """
    encoded = encode(name, samples, len(samples), storage)
    spec = encoded.spec
    tensor = StoredTensor(
        typed(torch.from_numpy(encoded.data), spec),
        spec,
        encoded.offsets,
        {suffix: torch.from_numpy(array) for suffix, array in encoded.beside.items()},
        np.zeros(len(samples), np.uint32),
    )
    arrays = [*encoded.beside.values(), *([] if encoded.offsets is None else [encoded.offsets])]
    chunks = (spec.codec.compress(spec.chunk(encoded.data, i)) for i in range(spec.chunks))
    nbytes = sum(array.nbytes for array in (*arrays, *chunks))
    return [tensor.sample(row) for row in range(len(samples))], nbytes


def typed(stored: Tensor, spec: ArraySpec) -> Tensor:
    """Return stored numbers in the type of the values, where only zarr's lack of bfloat16 makes them differ."""
    return stored.view(torch.bfloat16) if spec.dtype == "bfloat16" and spec.codec.is_lossless else stored


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return the tensor as an array on the same memory; bfloat16 as its bits, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
