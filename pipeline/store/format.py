"""The layout of a store on disk: names, arrays, and what metadata says of them.

    <store>/recipe.json
    <store>/suffix/                             what trains, as it was pretrained; may be absent
    <store>/probe/                              what the prefix gives for fixed inputs; may be absent
    <store>/<segment id>/zarr.json              zarr v3 group; with it the segment exists, without it it does not
    <store>/<segment id>/<array>/zarr.json      keys | sums | state.<name> | input.<name> | shape.<name>
                                                | extra.<name> | <tensor>.offsets (ragged) | <tensor>.scales (int8)
    <store>/<segment id>/<array>/c.0.0          raw: the one chunk, the array in little-endian C order and its crc32c
    <store>/<segment id>/<array>/c.3.0          zstd: one of several chunks along the first axis, each with its crc32c

docs/store-format.md tells the same to those who write a reader of their own.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import torch

from pipeline.errors import StoreError
from pipeline.keys import content_key, digest

FORMAT = 2
RECIPE_FILE = "recipe.json"
SUFFIX, PROBE = "suffix", "probe"
ATTACHMENTS = (SUFFIX, PROBE)
"""Folders of a store that hold no states."""
METADATA_FILE = "zarr.json"
KEYS = "keys"
SUMS = "sums"
STATE_PREFIX = "state."
INPUT_PREFIX = "input."
SHAPE_PREFIX = "shape."
EXTRA_PREFIX = "extra."
OFFSETS = ".offsets"
SCALES = ".scales"
SAMPLE_AXIS = "sample"
CHUNK_SEPARATOR = "."
CHECKSUM_BYTES = 4
COMPRESSED_CHUNK_BYTES = 8 << 20
"""Size that compressed chunks keep below where they hold more than one row: many, so that all cores decode."""
MAX_CHUNK_BYTES = (1 << 31) - (1 << 20)  # the compressor's own limit, less its overhead
MAX_METADATA_BYTES = 1 << 22
MAX_BESIDE_BYTES = 1 << 28
"""Size of arrays that are read into memory whole: keys, sums, offsets, scales."""
MAX_EMPTY_BYTES = 1 << 31
"""Size that an array without values may claim, its axes of length 0 counted as 1; no file bears such a claim out."""
SPARSE_ABOVE = 1 << 30
"""Larger chunk files must be on disk, not holes for the most part: reading those takes long and comes to nothing."""
MAX_RATIO = 1 << 14
"""A chunk holds at most so many times the bytes of its file; the compressor reaches a quarter of it, on zeros."""
MAX_AXES = 32

CLEVEL = 3

KEYS_CHUNK = CHUNK_SEPARATOR.join(["c", "0", "0"])
SEGMENT_ID = re.compile(r"[0-9a-f]{32}")
TENSOR_NAME = re.compile(r"(state|input|shape|extra)\.[A-Za-z0-9_.\-]{1,200}")
GROUP_FIELDS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}

# What the values are -> the zarr types they may be stored as; a float in int8 has scales beside it.
STORED_AS: dict[str, tuple[str, ...]] = {
    "float16": ("float16", "int8"),
    "bfloat16": ("uint16", "int8"),
    "float32": ("float32", "int8"),
    "int64": ("int32", "int64"),
    "int32": ("int32",),
    "int16": ("int16",),
    "int8": ("int8",),
    "uint8": ("uint8",),
    "uint32": ("uint32",),
    "bool": ("bool",),
}


@dataclass(frozen=True)
class ArraySpec:
    """One array of a segment.

    Attributes:
        shape: as stored; the first axis counts samples, or for a ragged tensor the entries of all samples.
        dtype: what the values are, a torch name (`bfloat16`).
        stored: the zarr type of the bytes (`uint16`).
        axis: for a ragged tensor the axis of a sample that was moved first; None otherwise.
        layout: one plain chunk, or several compressed ones.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str
    axis: int | None = None
    layout: Literal["raw", "zstd"] = "raw"

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes, without checksums and before compression."""
        return math.prod(self.shape) * np.dtype(self.stored).itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the values are."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def is_scaled(self) -> bool:
        """Whether the values are what is stored times a scale."""
        return self.stored == "int8" and self.torch_dtype.is_floating_point

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The whole array, or as many of its rows as fit in a compressed chunk; zarr wants no chunk to be empty."""
        whole = tuple(max(1, length) for length in self.shape)
        if self.layout == "raw":
            return whole
        row = max(1, math.prod(whole[1:]) * np.dtype(self.stored).itemsize)
        chunks = _ceil(whole[0], max(1, COMPRESSED_CHUNK_BYTES // row))
        return (_ceil(whole[0], chunks), *whole[1:])

    @property
    def chunk_nbytes(self) -> int:
        """Size of a chunk in bytes, before compression."""
        return math.prod(self.chunk_shape) * np.dtype(self.stored).itemsize

    @property
    def chunk_files(self) -> list[str]:
        """Names of the chunk files inside the array's folder, in the order of the rows; none for an empty array."""
        rest = ["0"] * (len(self.shape) - 1)
        return [CHUNK_SEPARATOR.join(["c", str(i), *rest]) for i in range(self.chunks)]

    @property
    def chunks(self) -> int:
        """How many chunk files there are."""
        return _ceil(self.shape[0], self.chunk_shape[0]) if self.nbytes else 0

    @property
    def codecs(self) -> list[dict[str, Any]]:
        """The array's zarr codecs, as metadata names them; zarr names no endianness for types of one byte."""
        size = np.dtype(self.stored).itemsize
        plain: dict[str, Any] = {"name": "bytes"}
        if size > 1:
            plain["configuration"] = {"endian": "little"}
        settings = {"typesize": size, "cname": "zstd", "clevel": CLEVEL, "shuffle": "bitshuffle", "blocksize": 0}
        zstd = [{"name": "blosc", "configuration": settings}] if self.layout == "zstd" else []
        return [plain, *zstd, {"name": "crc32c"}]

    @property
    def attributes(self) -> dict[str, Any]:
        """The array's zarr attributes."""
        return {"dtype": self.dtype} | ({} if self.axis is None else {"ragged_axis": self.axis})

    def dimension_names(self, name: str) -> list[str]:
        """Names of the axes of the array `name`, which xarray asks for: one that all share counts the samples."""
        counts_samples = self.axis is None and not name.endswith((OFFSETS, SCALES))
        first = SAMPLE_AXIS if counts_samples else f"{name}.0"
        return [first, *(f"{name}.{axis}" for axis in range(1, len(self.shape)))]

    def metadata(self, name: str) -> dict[str, Any]:
        """What `zarr.json` of the array `name` says, but for the fill value."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": CHUNK_SEPARATOR}},
            "codecs": self.codecs,
            "attributes": self.attributes,
            "dimension_names": self.dimension_names(name),
        }


@dataclass(frozen=True)
class SegmentSpec:
    """A segment's own metadata.

    Attributes:
        recipe: digest of the recipe of its states.
        samples: how many it holds.
        tensors: names of its tensors, in the order of the columns of `sums`.
        set_aside: keys, in hex, of the samples of the same unit that were found bad.
        seal: digest of all metadata of the segment, this field left out.
    """

    recipe: str
    samples: int
    tensors: tuple[str, ...]
    set_aside: tuple[str, ...]
    seal: str = ""

    @property
    def attributes(self) -> dict[str, Any]:
        """The group's zarr attributes."""
        return {
            "format": FORMAT,
            "recipe": self.recipe,
            "samples": self.samples,
            "tensors": list(self.tensors),
            "set_aside": list(self.set_aside),
            "seal": self.seal,
        }

    def sealed_over(self, arrays: Mapping[str, Any]) -> str:
        """Return the seal: digest of this metadata and that of the arrays, by name."""
        return digest({"segment": self.attributes | {"seal": ""}, "arrays": dict(arrays)})


def segment_id(keys: np.ndarray) -> str:
    """Return the id of the segment that holds exactly these samples (n, 16) uint8 in this order."""
    return content_key(keys).hex()


def is_committed(segment: Path) -> bool:
    """Return whether `segment` is a whole segment rather than what a broken copy left."""
    return (segment / METADATA_FILE).is_file()


def committed_segments(root: Path) -> list[str]:
    """Return the ids of the segments under `root`, sorted.

    Raises:
        StoreError: the folder cannot be read.
    """
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


def check_tensor_name(name: str) -> None:
    """Raise StoreError unless `name` can name a tensor of a segment; names become folder names."""
    if not is_tensor_name(name):
        raise StoreError(
            f"tensor name {name!r}: expected state.NAME, input.NAME, shape.NAME or extra.NAME, of letters, digits, "
            f"'_', '.', '-', not ending in {OFFSETS!r} or {SCALES!r}; rename it"
        )


def sample_sums(data: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """Return the crc32c of each sample's stored bytes, (n,) uint32; `data` as stored, C-contiguous."""
    flat = data.reshape(len(data), -1)
    bounds = np.arange(len(data) + 1) if offsets is None else offsets
    return np.array([sample_sum(flat[a:b]) for a, b in itertools.pairwise(bounds.tolist())], np.uint32)


def sample_sum(stored: np.ndarray) -> int:
    """Return the crc32c of the bytes of one sample, C-contiguous."""
    return int(google_crc32c.value(stored))


def is_tensor_name(name: str) -> bool:
    return bool(TENSOR_NAME.fullmatch(name)) and not name.endswith((OFFSETS, SCALES))


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
