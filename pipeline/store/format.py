"""The layout of a store on disk: names, array metadata, and the checks that everything read back must pass.

    <store>/recipe.json
    <store>/<segment id>/zarr.json                  zarr v3 group; with it the segment exists, without it it does not
    <store>/<segment id>/<array>/zarr.json          keys | state.<name> | input.<name> | shape.<name> | <array>.offsets
    <store>/<segment id>/<array>/c.0.0              the one chunk: the array in little-endian C order, then its crc32c

Metadata is parsed here and not by zarr because more must hold than zarr asks: only an array in exactly this layout may
be memory-mapped, and nothing a file says is believed before the size of the chunk file has confirmed it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES, content_key

FORMAT = 1
RECIPE_FILE = "recipe.json"
METADATA_FILE = "zarr.json"
KEYS = "keys"
STATE_PREFIX = "state."
INPUT_PREFIX = "input."
SHAPE_PREFIX = "shape."
OFFSETS = ".offsets"
CHUNK_SEPARATOR = "."
CHECKSUM_BYTES = 4
MAX_METADATA_BYTES = 1 << 20
MAX_AXES = 32

CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
BYTE_CODECS = [{"name": "bytes"}, {"name": "crc32c"}]  # zarr names no endianness for types of one byte

_SEGMENT_ID = re.compile(r"[0-9a-f]{32}")
_TENSOR_NAME = re.compile(r"(state|input|shape)\.[A-Za-z0-9_.\-]{1,200}")

# What the values are -> the zarr types they may be stored as.
STORED_AS: dict[str, tuple[str, ...]] = {
    "float16": ("float16",),
    "bfloat16": ("uint16",),
    "float32": ("float32",),
    "int64": ("int32", "int64"),
    "int32": ("int32",),
    "int16": ("int16",),
    "int8": ("int8",),
    "uint8": ("uint8",),
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
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str
    axis: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes, without the checksum."""
        return math.prod(self.shape) * np.dtype(self.stored).itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the values are."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The whole array; zarr wants no chunk to be empty."""
        return tuple(max(1, length) for length in self.shape)

    @property
    def chunk_file(self) -> str:
        """Name of the chunk file inside the array's folder."""
        return CHUNK_SEPARATOR.join(["c", *("0" for _ in self.shape)])

    @property
    def attributes(self) -> dict[str, Any]:
        """The array's zarr attributes."""
        return {"dtype": self.dtype} | ({} if self.axis is None else {"ragged_axis": self.axis})


@dataclass(frozen=True)
class SegmentSpec:
    """A segment's own metadata: how many samples, and the names of its tensors in the order they were written."""

    samples: int
    tensors: tuple[str, ...]

    @property
    def attributes(self) -> dict[str, Any]:
        """The group's zarr attributes."""
        return {"format": FORMAT, "samples": self.samples, "tensors": list(self.tensors)}


def segment_id(keys: np.ndarray) -> str:
    """Return the id of the segment that holds exactly these samples (n, 16) uint8 in this order."""
    return content_key(keys).hex()


def is_committed(segment: Path) -> bool:
    """Return whether `segment` is a whole segment rather than what a broken copy left."""
    return (segment / METADATA_FILE).is_file()


def committed_segments(root: Path) -> list[str]:
    """Return the ids of the segments under `root`, sorted."""
    return sorted(entry.name for entry in root.iterdir() if _SEGMENT_ID.fullmatch(entry.name) and is_committed(entry))


def segment_nbytes(segment: Path) -> int:
    """Return the size of a segment's files in bytes."""
    return sum(path.stat().st_size for path in segment.rglob("*") if path.is_file())


def check_tensor_name(name: str) -> None:
    """Raise StoreError unless `name` can name a tensor of a segment; names become folder names."""
    if not _TENSOR_NAME.fullmatch(name) or name.endswith(OFFSETS):
        raise StoreError(
            f"tensor name {name!r}: expected state.NAME, input.NAME or shape.NAME, of letters, digits, '_', '.', '-', "
            f"not ending in {OFFSETS!r}; rename it"
        )


def read_segment_spec(segment: Path) -> SegmentSpec:
    """Return the metadata of a segment.

    Raises:
        CorruptStoreError: `zarr.json` is missing, or is not what this package writes.
    """
    where, raw = _read_json(segment)
    attributes = raw.get("attributes")
    if raw.get("zarr_format") != 3 or raw.get("node_type") != "group" or not isinstance(attributes, dict):
        raise _corrupt(where, "is no zarr v3 group")
    samples, tensors = attributes.get("samples"), attributes.get("tensors")
    if attributes.get("format") != FORMAT or not _is_size(samples) or not isinstance(tensors, list):
        raise _corrupt(where, f"has attributes {attributes!r}, expected format {FORMAT}, samples and tensors")
    for name in tensors:
        if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
            raise _corrupt(where, f"names a tensor {name!r}")
    return SegmentSpec(samples, tuple(tensors))


def read_array_spec(array: Path) -> ArraySpec:
    """Return the metadata of an array, once its chunk file is known to have the size the metadata demands.

    Raises:
        CorruptStoreError: metadata or chunk file are missing, are not what this package writes, or do not fit together.
    """
    where, raw = _read_json(array)
    if raw.get("zarr_format") != 3 or raw.get("node_type") != "array":
        raise _corrupt(where, "is no zarr v3 array")
    spec = _parse_array(where, raw)
    if spec.nbytes:
        chunk = array / spec.chunk_file
        try:
            size = chunk.stat().st_size
        except OSError as error:
            raise CorruptStoreError(f"{chunk}: cannot be read ({error.strerror}); {_REMEDY}") from error
        if size != spec.nbytes + CHECKSUM_BYTES:
            raise _corrupt(
                chunk, f"has {size} bytes, shape {spec.shape} of {spec.stored} needs {spec.nbytes + CHECKSUM_BYTES}"
            )
    return spec


def read_keys(segment: Path) -> np.ndarray:
    """Return a segment's sample keys (n, 16) uint8, proved against the segment's id.

    Raises:
        CorruptStoreError: the keys cannot be read, or are not those the segment was named after.
    """
    array = segment / KEYS
    spec = read_array_spec(array)
    if len(spec.shape) != 2 or spec.shape[1] != KEY_BYTES or spec.stored != "uint8":
        raise _corrupt(array, f"has shape {spec.shape} of {spec.stored}, expected (n, {KEY_BYTES}) of uint8")
    keys = np.fromfile(array / spec.chunk_file, np.uint8, spec.nbytes).reshape(spec.shape)
    if segment_id(keys) != segment.name:
        raise _corrupt(segment, f"holds the samples of segment {segment_id(keys)}")
    return keys


def _parse_array(where: Path, raw: dict[str, Any]) -> ArraySpec:
    shape, stored, attributes = raw.get("shape"), raw.get("data_type"), raw.get("attributes")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_AXES or not all(_is_size(length) for length in shape):
        raise _corrupt(where, f"has shape {shape!r}")
    dtype = attributes.get("dtype") if isinstance(attributes, dict) else None
    if not isinstance(dtype, str) or stored not in STORED_AS.get(dtype, ()):
        raise _corrupt(where, f"stores {dtype!r} as {stored!r}")
    axis = attributes.get("ragged_axis") if isinstance(attributes, dict) else None
    if axis is not None and not (_is_size(axis) and axis < len(shape)):
        raise _corrupt(where, f"has ragged_axis {axis!r} and {len(shape)} axes")
    spec = ArraySpec(tuple(shape), dtype, stored, axis)
    layout = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": CHUNK_SEPARATOR}},
        "codecs": BYTE_CODECS if np.dtype(stored).itemsize == 1 else CODECS,
    }
    for field, expected in layout.items():
        if raw.get(field) != expected:
            raise _corrupt(where, f"has {field} {raw.get(field)!r}, expected {expected!r}")
    return spec


def _read_json(node: Path) -> tuple[Path, dict[str, Any]]:
    where = node / METADATA_FILE
    try:
        with where.open("rb") as file:
            text = file.read(MAX_METADATA_BYTES + 1)
    except OSError as error:
        raise CorruptStoreError(f"{where}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if len(text) > MAX_METADATA_BYTES:
        raise _corrupt(where, f"is longer than {MAX_METADATA_BYTES} bytes")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{where}: is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(raw, dict):
        raise _corrupt(where, "is no JSON object")
    return where, raw


_REMEDY = "remove the segment's folder and encode again"


def _corrupt(where: Path, fault: str) -> CorruptStoreError:
    return CorruptStoreError(f"{where} {fault}; {_REMEDY}")


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
