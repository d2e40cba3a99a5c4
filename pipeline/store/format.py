"""The layout of a store on disk: names, metadata, and the checks that everything read back must pass.

    <store>/recipe.json
    <store>/<segment id>/zarr.json              zarr v3 group; with it the segment exists, without it it does not
    <store>/<segment id>/<array>/zarr.json      keys | sums | state.<name> | input.<name> | shape.<name>
                                                | <tensor>.offsets (ragged) | <tensor>.scales (int8)
    <store>/<segment id>/<array>/c.0.0          raw: the one chunk, the array in little-endian C order and its crc32c
    <store>/<segment id>/<array>/c.3.0          zstd: one of several chunks along the first axis, each with its crc32c

Metadata is parsed here and not by zarr because more must hold than zarr asks: only an array in exactly this layout may
be memory-mapped, and nothing a file says is believed before its seal and the sizes of the chunk files confirm it.
docs/store-format.md tells the same to those who write a reader of their own.
"""

from __future__ import annotations

import itertools
import math
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import google_crc32c
import numpy as np
import torch

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES, Recipe, content_key, digest, parse_json
from pipeline.store.untrusted import is_same, read_file

FORMAT = 2
RECIPE_FILE = "recipe.json"
METADATA_FILE = "zarr.json"
KEYS = "keys"
SUMS = "sums"
STATE_PREFIX = "state."
INPUT_PREFIX = "input."
SHAPE_PREFIX = "shape."
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
MAX_AXES = 32

CLEVEL = 3

_KEYS_CHUNK = CHUNK_SEPARATOR.join(["c", "0", "0"])
_SEGMENT_ID = re.compile(r"[0-9a-f]{32}")
_TENSOR_NAME = re.compile(r"(state|input|shape)\.[A-Za-z0-9_.\-]{1,200}")
_GROUP_FIELDS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}

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
        return sorted(one.name for one in root.iterdir() if _SEGMENT_ID.fullmatch(one.name) and is_committed(one))
    except OSError as error:
        raise StoreError(f"{root}: cannot be read ({error.strerror}); is the store still there?") from error


def find_stores(root: Path) -> list[Path]:
    """Return the folders of stores at and under `root`, sorted; segments and temporary folders are not looked into.

    Links under it are not followed: they may lead in circles, or anywhere.
    """
    found = [root] if (root / RECIPE_FILE).is_file() else []
    inner = [one for one in root.iterdir() if one.is_dir() and not one.is_symlink()] if root.is_dir() else []
    for folder in sorted(inner):
        if not _SEGMENT_ID.fullmatch(folder.name) and not folder.name.startswith("."):
            found += find_stores(folder)
    return found


def segment_nbytes(segment: Path) -> int:
    """Return the size of a segment's files in bytes."""
    return sum(path.stat().st_size for path in segment.rglob("*") if path.is_file())


def check_tensor_name(name: str) -> None:
    """Raise StoreError unless `name` can name a tensor of a segment; names become folder names."""
    if not _is_tensor_name(name):
        raise StoreError(
            f"tensor name {name!r}: expected state.NAME, input.NAME or shape.NAME, of letters, digits, '_', '.', '-', "
            f"not ending in {OFFSETS!r} or {SCALES!r}; rename it"
        )


def sample_sums(data: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """Return the crc32c of each sample's stored bytes, (n,) uint32; `data` as stored, C-contiguous."""
    flat = data.reshape(len(data), -1)
    bounds = np.arange(len(data) + 1) if offsets is None else offsets
    return np.array([sample_sum(flat[a:b]) for a, b in itertools.pairwise(bounds.tolist())], np.uint32)


def sample_sum(stored: np.ndarray) -> int:
    """Return the crc32c of the bytes of one sample, C-contiguous."""
    return int(google_crc32c.value(stored))


def read_recipe(store: Path) -> Recipe:
    """Return the recipe of the store at `store`.

    Raises:
        StoreError: no store is there, or one of a format that this version does not read.
        CorruptStoreError: `recipe.json` is no recipe.
    """
    where = store / RECIPE_FILE
    try:
        text = read_file(where, MAX_METADATA_BYTES)
        recipe = Recipe.from_json(text.decode("utf-8"))
    except OSError as error:
        raise StoreError(f"{where}: cannot be read ({error.strerror}); no store is here, encode first") from error
    except ValueError as error:
        raise CorruptStoreError(f"{where}: {error}; restore it, or remove the store and encode again") from error
    if recipe.format != FORMAT:
        raise StoreError(f"{where}: format is {recipe.format}, this version reads {FORMAT}; encode again")
    return recipe


def read_segment_spec(segment: Path) -> SegmentSpec:
    """Return the metadata of a segment. Its seal is not looked at: see `check_seal`.

    Raises:
        CorruptStoreError: `zarr.json` is missing, or is not what this package writes.
    """
    where, raw = _read_json(segment)
    attributes = raw.get("attributes")
    plain = raw.keys() <= _GROUP_FIELDS and raw.get("consolidated_metadata") is None
    if raw.get("zarr_format") != 3 or raw.get("node_type") != "group" or not isinstance(attributes, dict) or not plain:
        raise corrupt(where, "is no plain zarr v3 group")
    if attributes.get("format") != FORMAT:
        raise corrupt(where, f"has format {attributes.get('format')!r}, expected {FORMAT}")
    recipe, samples, tensors = attributes.get("recipe"), attributes.get("samples"), attributes.get("tensors")
    set_aside, seal = attributes.get("set_aside"), attributes.get("seal")
    if not _is_size(samples) or not _all_match(tensors, _TENSOR_NAME) or not _all_match(set_aside, _SEGMENT_ID):
        raise corrupt(where, f"has samples {samples!r}, tensors {tensors!r}, set_aside {set_aside!r}")
    names_fit = all(map(_is_tensor_name, tensors)) and len(set(tensors)) == len(tensors)
    if not isinstance(recipe, str) or not isinstance(seal, str) or not names_fit:
        raise corrupt(where, f"has recipe {recipe!r}, seal {seal!r}, tensors {tensors!r}")
    spec = SegmentSpec(recipe, samples, tuple(tensors), tuple(set_aside), seal)
    if attributes != spec.attributes:
        raise corrupt(where, f"has attributes {sorted(attributes)}, expected {sorted(spec.attributes)}")
    return spec


def check_seal(segment: Path, spec: SegmentSpec, arrays: Sequence[str]) -> None:
    """Raise CorruptStoreError unless the metadata of a segment and of its `arrays` is that which was written."""
    try:
        seal = spec.sealed_over({name: read_metadata(segment / name) for name in arrays})
    except ValueError as error:
        raise corrupt(segment, f"has metadata that cannot be sealed ({error})") from error
    if seal != spec.seal:
        raise corrupt(segment, "has metadata that does not match its seal")


def read_array_spec(array: Path) -> ArraySpec:
    """Return the metadata of an array, once its chunk files are known to have the sizes the metadata demands.

    Raises:
        CorruptStoreError: metadata or chunk files are missing, are not what this package writes, or do not fit.
    """
    where, raw = _read_json(array)
    if raw.get("zarr_format") != 3 or raw.get("node_type") != "array":
        raise corrupt(where, "is no zarr v3 array")
    spec = _parse_array(where, raw)
    if spec.layout == "zstd":
        _check_count(array, spec)
    for name in spec.chunk_files:
        try:
            found = (array / name).stat()
        except OSError as error:
            raise _unreadable(array / name, error) from error
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            raise corrupt(array / name, "is no file")
        if size > SPARSE_ABOVE and found.st_blocks * 512 < size // 64:
            raise corrupt(array / name, f"has {size} bytes, of which {found.st_blocks * 512} are on disk")
        if spec.layout == "raw" and size != spec.nbytes + CHECKSUM_BYTES:
            needed = spec.nbytes + CHECKSUM_BYTES
            raise corrupt(array / name, f"has {size} bytes, shape {spec.shape} of {spec.stored} needs {needed}")
    return spec


def read_small(array: Path, spec: ArraySpec) -> np.ndarray:
    """Return a raw array whole, in its stored type, once its checksum is proved; for those that are small.

    Raises:
        CorruptStoreError: the bytes are not those that were written.
    """
    if spec.layout != "raw" or spec.nbytes > MAX_BESIDE_BYTES:
        raise corrupt(array, f"has {spec.nbytes} bytes in layout {spec.layout}, expected raw and {MAX_BESIDE_BYTES}")
    if not spec.nbytes:
        return np.empty(spec.shape, spec.stored)
    where = array / spec.chunk_files[0]
    raw = read_chunk(where)
    values, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
    if google_crc32c.value(values) != int.from_bytes(checksum, "little"):
        raise corrupt(where, "does not match its checksum")
    return np.frombuffer(values, np.dtype(spec.stored).newbyteorder("<")).reshape(spec.shape)


def read_keys(segment: Path) -> np.ndarray:
    """Return a segment's sample keys (n, 16) uint8, proved against the segment's id, so that no metadata is needed.

    Raises:
        CorruptStoreError: the keys cannot be read, or are not those the segment was named after.
    """
    where = f"{segment}/{KEYS}/{_KEYS_CHUNK}"  # strings: with thousands of segments, paths take longer than reading
    try:
        raw = read_file(where, MAX_BESIDE_BYTES)
    except (OSError, ValueError) as error:
        raise CorruptStoreError(f"{where}: cannot be read ({error}); {REMEDY}") from error
    if len(raw) % KEY_BYTES != CHECKSUM_BYTES or len(raw) == CHECKSUM_BYTES:
        raise CorruptStoreError(f"{where} has {len(raw)} bytes, which hold no whole number of keys; {REMEDY}")
    keys = np.frombuffer(raw, np.uint8, len(raw) - CHECKSUM_BYTES).reshape(-1, KEY_BYTES)
    if segment_id(keys) != segment.name:
        raise corrupt(segment, f"holds the samples of segment {segment_id(keys)}")
    return keys


def _parse_array(where: Path, raw: dict[str, Any]) -> ArraySpec:
    shape, stored, attributes = raw.get("shape"), raw.get("data_type"), raw.get("attributes")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_AXES or not all(_is_size(length) for length in shape):
        raise corrupt(where, f"has shape {shape!r}")
    dtype = attributes.get("dtype") if isinstance(attributes, dict) else None
    if not isinstance(dtype, str) or stored not in STORED_AS.get(dtype, ()):
        raise corrupt(where, f"stores {dtype!r} as {stored!r}")
    axis = attributes.get("ragged_axis") if isinstance(attributes, dict) else None
    if axis is not None and not (_is_size(axis) and axis < len(shape)):
        raise corrupt(where, f"has ragged_axis {axis!r} and {len(shape)} axes")
    compressed = isinstance(codecs := raw.get("codecs"), list) and len(codecs) > 2
    spec = ArraySpec(tuple(shape), dtype, stored, axis, "zstd" if compressed else "raw")
    metadata = spec.metadata(where.parent.name)
    for field, expected in metadata.items():
        if not is_same(raw.get(field), expected):
            raise corrupt(where, f"has {field} {raw.get(field)!r}, expected {expected!r}")
    fill = raw.get("fill_value")
    if not isinstance(fill, bool | int | float) or fill != 0:
        raise corrupt(where, f"has fill_value {fill!r}, expected 0")
    others = raw.keys() - metadata.keys() - {"fill_value", "storage_transformers"}
    if others or raw.get("storage_transformers"):
        raise corrupt(where, f"has {sorted(others) or 'storage_transformers'}, which no array here has")
    claimed = math.prod(max(1, length) for length in spec.shape) * np.dtype(stored).itemsize
    if not spec.nbytes and claimed > MAX_EMPTY_BYTES:
        raise corrupt(where, f"has no values and claims {claimed} bytes, at most {MAX_EMPTY_BYTES}")
    if compressed and spec.chunk_nbytes > MAX_CHUNK_BYTES:
        raise corrupt(where, f"has chunks of {spec.chunk_nbytes} bytes, at most {MAX_CHUNK_BYTES} can be compressed")
    return spec


def _check_count(array: Path, spec: ArraySpec) -> None:
    """A shape may claim anything: look for as many chunks before naming them one by one."""
    there = sum(1 for _ in array.iterdir()) - 1
    if there != spec.chunks:
        raise corrupt(array, f"has {there} chunk files, shape {spec.shape} of {spec.stored} needs {spec.chunks}")


def read_metadata(node: Path) -> dict[str, Any]:
    """Return what `zarr.json` of a group or an array says, as it stands there.

    Raises:
        CorruptStoreError: it cannot be read, or is no JSON object.
    """
    return _read_json(node)[1]


def _read_json(node: Path) -> tuple[Path, dict[str, Any]]:
    where = node / METADATA_FILE
    try:
        text = read_file(where, MAX_METADATA_BYTES)
        raw = parse_json(text.decode("utf-8"))
    except OSError as error:
        raise _unreadable(where, error) from error
    except ValueError as error:
        raise CorruptStoreError(f"{where}: is not JSON ({error}); {REMEDY}") from error
    if not isinstance(raw, dict):
        raise corrupt(where, "is no JSON object")
    return where, raw


def read_chunk(where: Path) -> bytes:
    """Return a chunk file whole.

    Raises:
        CorruptStoreError: it cannot be read, or is no file.
    """
    try:
        return read_file(where)
    except OSError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: Path, error: OSError) -> CorruptStoreError:
    return CorruptStoreError(f"{where}: cannot be read ({error.strerror}); {REMEDY}")


REMEDY = "remove the segment's folder and encode again"


def corrupt(where: Path, fault: str) -> CorruptStoreError:
    """Return the error for a file or folder `where` that is not what was written."""
    return CorruptStoreError(f"{where} {fault}; {REMEDY}")


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _all_match(value: object, pattern: re.Pattern[str]) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and pattern.fullmatch(item) for item in value)


def _is_tensor_name(name: str) -> bool:
    return bool(_TENSOR_NAME.fullmatch(name)) and not name.endswith((OFFSETS, SCALES))
