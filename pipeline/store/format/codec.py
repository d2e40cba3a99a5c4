"""What a codec is: the class that every one derives from, and the types that values are stored in."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOATS = ("float16", "bfloat16", "float32")
STORED_AS: Mapping[str, tuple[str, ...]] = {
    "float16": ("float16",),
    "bfloat16": ("uint16",),
    "float32": ("float32",),
    "int64": ("int32", "int64"),
    **{name: (name,) for name in ("int32", "int16", "int8", "uint8", "uint32", "bool")},
}
"""Dtype of values -> zarr types that may hold them as they are; zarr has no bfloat16, and holds its bits."""


class Codec:
    """How the values of an array are stored; a subclass overrides what differs from storing them as they are."""

    name: ClassVar[str]
    is_mappable: ClassVar[bool] = True
    """Whether the array is one chunk file that can be memory-mapped; else `compress` makes several."""
    is_lossless: ClassVar[bool] = True
    """Whether the stored numbers are the values; else `decode` computes the values from them."""
    is_mergeable: ClassVar[bool] = True
    """Whether arrays of several segments, and those beside them, may be laid end to end."""
    is_packed: ClassVar[bool] = False
    """Whether an entry is stored as a row of bytes, (bytes,), whose metadata says the shape of its values."""
    beside: ClassVar[Mapping[str, str]] = {}
    """Arrays stored beside the array: suffix of their names -> zarr type. They broadcast against the array."""
    max_chunk_bytes: ClassVar[int] = sys.maxsize

    def covers(self, name: str, narrow: "Tensor") -> bool:
        """Return whether this codec stores the tensor `name`, rather than `raw`; `narrow` has the final dtype."""
        return True

    def stored_types(self, dtype: str) -> Sequence[str]:
        """Return the zarr types that may hold values of `dtype`."""
        return STORED_AS.get(dtype, ())

    def encode(self, tensor: "Tensor", narrow: "Tensor", *, ragged: bool) -> "tuple[Tensor, dict[str, Tensor]]":
        """Return the stored numbers of a tensor, and the arrays beside them by suffix; `narrow` has the final dtype."""
        return narrow, {}

    def entry_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a stored entry whose values have this shape; only of a packed codec."""
        raise NotImplementedError

    def decode(
        self, stored: "Tensor", beside: "Mapping[str, Tensor]", dtype: "torch.dtype", shape: Sequence[int]
    ) -> "Tensor":
        """Return the values in `dtype` of stored numbers, (entries, *shape); not called for a lossless codec."""
        raise NotImplementedError

    def compressors(self, itemsize: int) -> list[dict[str, Any]]:
        """Return the zarr codecs between `bytes` and `crc32c`, as metadata names them."""
        return []

    def compress(self, chunk: np.ndarray) -> np.ndarray:
        """Return the content of a chunk's file, but for the checksum; `chunk` is little-endian in C order."""
        return chunk

    def decompress(self, where: Path, packed: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` with the chunk that the file `where` holds as `packed`, (bytes,) uint8.

        Raises:
            CorruptStoreError: it is no chunk of this size.
        """
        raise NotImplementedError
