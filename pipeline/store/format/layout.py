"""The layout of arrays, and where stores and segments are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.errors import StoreError
from pipeline.keys import content_key
from pipeline.store.format.codec import Codec
from pipeline.store.format.codecs import BESIDE, RAW
from pipeline.store.format.names import (
    CHUNK_SEPARATOR,
    METADATA_FILE,
    RECIPE_FILE,
    SAMPLE_AXIS,
    SEGMENT_ID,
    TENSOR_NAME,
)

COMPRESSED_CHUNK_BYTES = 8 << 20
"""Size that compressed chunks of more than one row stay below: many chunks keep all cores busy."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a segment.

    Attributes:
        shape: as stored; the first axis counts samples, or for a ragged tensor the entries of all samples.
        dtype: torch name of the values' type (`bfloat16`).
        stored: zarr type of the stored numbers (`uint16`).
        axis: for a ragged tensor the axis of a sample that was moved first; None otherwise.
        packed: for a packed codec the shape of an entry's values; None otherwise.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str
    axis: int | None = None
    codec: Codec = RAW
    packed: tuple[int, ...] | None = None

    @property
    def entry(self) -> tuple[int, ...]:
        """Shape of the values of one entry of the first axis."""
        return self.shape[1:] if self.packed is None else self.packed

    @property
    def itemsize(self) -> int:
        """Size of a stored number in bytes."""
        return np.dtype(self.stored).itemsize

    @property
    def nbytes(self) -> int:
        """Size of the stored numbers in bytes, without checksums and before compression."""
        return math.prod(self.shape) * self.itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The whole array, or the rows that fit in a compressed chunk; zarr forbids empty chunks."""
        whole = tuple(max(1, length) for length in self.shape)
        if self.codec.is_mappable:
            return whole
        row = math.prod(whole[1:]) * self.itemsize
        chunks = _ceil(whole[0], max(1, COMPRESSED_CHUNK_BYTES // row))
        return (_ceil(whole[0], chunks), *whole[1:])

    @property
    def chunk_nbytes(self) -> int:
        """Size of a chunk in bytes, before compression."""
        return math.prod(self.chunk_shape) * self.itemsize

    @property
    def chunks(self) -> int:
        """Number of chunk files; none for an empty array."""
        return _ceil(self.shape[0], self.chunk_shape[0]) if self.nbytes else 0

    @property
    def chunk_files(self) -> list[str]:
        """Names of the chunk files inside the array's folder, in the order of the rows."""
        rest = ["0"] * (len(self.shape) - 1)
        return [CHUNK_SEPARATOR.join(["c", str(i), *rest]) for i in range(self.chunks)]

    def chunk(self, data: np.ndarray, number: int) -> np.ndarray:
        """Return one chunk of the array `data`, the last one filled up with zeros."""
        rows = self.chunk_shape[0]
        part = data[number * rows : (number + 1) * rows]
        missing = rows - len(part)
        return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the `zarr.json` of the array `name`."""
        axes = [f"{name}.{axis}" for axis in range(len(self.shape))]
        if self.axis is None and not name.endswith(BESIDE):
            axes[0] = SAMPLE_AXIS  # one that all arrays share, for xarray
        packed = {} if self.packed is None else {"codec": self.codec.name, "entry_shape": list(self.packed)}
        endian = {"configuration": {"endian": "little"}} if self.itemsize > 1 else {}  # zarr names none for one byte
        return {
            "shape": list(self.shape),
            "data_type": self.stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": CHUNK_SEPARATOR}},
            "fill_value": np.zeros((), self.stored).item(),
            "codecs": [{"name": "bytes", **endian}, *self.codec.compressors(self.itemsize), {"name": "crc32c"}],
            "attributes": {"dtype": self.dtype} | ({} if self.axis is None else {"ragged_axis": self.axis}) | packed,
            "dimension_names": axes,
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as it is stored.

    Attributes:
        data: the stored numbers.
        offsets: (n + 1,) int64 for a ragged tensor.
        beside: the codec's arrays beside it, by suffix, broadcastable against `data`.
    """

    spec: ArraySpec
    data: np.ndarray
    offsets: np.ndarray | None = None
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)


def segment_id(keys: np.ndarray) -> str:
    """Return the id of the segment that holds exactly these samples (n, 16) uint8 in this order."""
    return content_key(keys).hex()


def is_committed(segment: Path) -> bool:
    """Return whether `segment` is a whole segment rather than what a broken copy left."""
    return (segment / METADATA_FILE).is_file()


def committed_segments(root: Path) -> list[str]:
    """Return the ids of the segments under `root`, sorted; raises StoreError where it cannot be read."""
    try:
        return sorted(one.name for one in root.iterdir() if SEGMENT_ID.fullmatch(one.name) and is_committed(one))
    except OSError as error:
        raise StoreError(f"{root}: cannot be read ({error.strerror}); is the store still there?") from error


def find_stores(root: Path) -> list[Path]:
    """Return the folders of stores at and under `root`, sorted; segments and temporary folders are not looked into.

    Links under it are not followed: they may lead in circles, or anywhere.
    """
    found = [root] if (root / RECIPE_FILE).is_file() else []
    inner = [one for one in root.iterdir() if one.is_dir() and not one.is_symlink()] if root.is_dir() else []
    for folder in sorted(inner):
        if not SEGMENT_ID.fullmatch(folder.name) and not folder.name.startswith("."):
            found += find_stores(folder)
    return found


def is_tensor_name(name: str) -> bool:
    """Return whether `name` can name a tensor of a segment."""
    return bool(TENSOR_NAME.fullmatch(name)) and not name.endswith(BESIDE)


def check_tensor_name(name: str) -> None:
    """Raise StoreError unless `name` can name a tensor of a segment; names become folder names."""
    if not is_tensor_name(name):
        raise StoreError(
            f"tensor name {name!r}: expected state.NAME, input.NAME, shape.NAME or extra.NAME, of letters, digits, "
            f"'_', '.', '-', not ending in {' or '.join(map(repr, BESIDE))}; rename it"
        )


def sample_bounds(rows: np.ndarray, offsets: np.ndarray | None) -> list[tuple[int, int]]:
    """Return where samples begin and end along the first axis; without `offsets` each is one entry."""
    starts, ends = (rows, rows + 1) if offsets is None else (offsets[rows], offsets[rows + 1])
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def sample_sums(stored: np.ndarray, bounds: Iterable[tuple[int, int]]) -> list[int]:
    """Return the crc32c of the stored bytes of each sample; `stored` is C-contiguous."""
    return [int(google_crc32c.value(stored[begin:end])) for begin, end in bounds]


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
