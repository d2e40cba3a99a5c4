"""Reading a store's metadata and small arrays: nothing a file says is believed before it is proved.

Metadata is parsed here and not by zarr because more must hold than zarr asks: only an array in exactly this layout may
be memory-mapped, and what it claims must be confirmed by its seal and by the sizes of its chunk files.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import google_crc32c
import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES, Recipe, parse_json
from pipeline.store.format import (
    CHECKSUM_BYTES,
    CHUNK_SEPARATOR,
    FORMAT,
    GROUP_FIELDS,
    KEYS,
    KEYS_CHUNK,
    MAX_AXES,
    MAX_BESIDE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_EMPTY_BYTES,
    MAX_METADATA_BYTES,
    MAX_RATIO,
    METADATA_FILE,
    OFFSETS,
    RECIPE_FILE,
    SCALES,
    SEGMENT_ID,
    SPARSE_ABOVE,
    STORED_AS,
    SUMS,
    TENSOR_NAME,
    ArraySpec,
    SegmentSpec,
    is_tensor_name,
    segment_id,
)
from pipeline.store.untrusted import is_same, read_file


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
    """Return the metadata of a segment. Its seal is not looked at: see `read_arrays`.

    Raises:
        CorruptStoreError: `zarr.json` is missing, or is not what this package writes.
    """
    where, raw = _read_json(segment)
    attributes = raw.get("attributes")
    plain = raw.keys() <= GROUP_FIELDS and raw.get("consolidated_metadata") is None
    if raw.get("zarr_format") != 3 or raw.get("node_type") != "group" or not isinstance(attributes, dict) or not plain:
        raise corrupt(where, "is no plain zarr v3 group")
    if attributes.get("format") != FORMAT:
        raise corrupt(where, f"has format {attributes.get('format')!r}, expected {FORMAT}")
    recipe, samples, tensors = attributes.get("recipe"), attributes.get("samples"), attributes.get("tensors")
    set_aside, seal = attributes.get("set_aside"), attributes.get("seal")
    if not _is_size(samples) or not _all_match(tensors, TENSOR_NAME) or not _all_match(set_aside, SEGMENT_ID):
        raise corrupt(where, f"has samples {samples!r}, tensors {tensors!r}, set_aside {set_aside!r}")
    names_fit = all(map(is_tensor_name, tensors)) and len(set(tensors)) == len(tensors)
    if not isinstance(recipe, str) or not isinstance(seal, str) or not names_fit:
        raise corrupt(where, f"has recipe {recipe!r}, seal {seal!r}, tensors {tensors!r}")
    spec = SegmentSpec(recipe, samples, tuple(tensors), tuple(set_aside), seal)
    if attributes != spec.attributes:
        raise corrupt(where, f"has attributes {sorted(attributes)}, expected {sorted(spec.attributes)}")
    return spec


def read_arrays(segment: Path, spec: SegmentSpec) -> dict[str, ArraySpec]:
    """Return the metadata of all arrays of a segment by name, once its seal proves that it is what was written.

    What it claims is not confirmed by the chunk files: see `check_chunks`.

    Raises:
        CorruptStoreError: metadata is missing, is not what this package writes, or does not fit.
    """
    raw: dict[str, dict[str, Any]] = {}
    arrays: dict[str, ArraySpec] = {}

    def read(name: str) -> ArraySpec:
        where, raw[name] = _read_json(segment / name)
        arrays[name] = _parse_array(where, raw[name])
        return arrays[name]

    for name in (KEYS, SUMS):
        read(name)
    for name in spec.tensors:
        tensor = read(name)
        if tensor.axis is not None:
            read(f"{name}{OFFSETS}")
        if tensor.is_scaled:
            read(f"{name}{SCALES}")
    try:
        seal = spec.sealed_over(raw)
    except ValueError as error:
        raise corrupt(segment, f"has metadata that cannot be sealed ({error})") from error
    if seal != spec.seal:
        raise corrupt(segment, "has metadata that does not match its seal")
    return arrays


def read_array_spec(array: Path) -> ArraySpec:
    """Return the metadata of an array, which its chunk files need not confirm: see `check_chunks`.

    Raises:
        CorruptStoreError: it is missing, or is not what this package writes.
    """
    return _parse_array(*_read_json(array))


def check_chunks(array: Path, spec: ArraySpec, sizes: Mapping[str, int]) -> None:
    """Prove by the sizes of an array's chunk files, in bytes by name, that it can hold what its metadata claims.

    To be called before memory or disk is taken for an array.

    Raises:
        CorruptStoreError: some are missing, or have other sizes than the metadata demands.
    """
    if spec.layout == "zstd" and len(sizes) != spec.chunks:  # a shape may claim anything: count before naming each
        raise corrupt(array, f"has {len(sizes)} chunk files, shape {spec.shape} of {spec.stored} needs {spec.chunks}")
    for name in spec.chunk_files:
        if name not in sizes:
            raise corrupt(array / name, "is not there")
        needed = spec.nbytes + CHECKSUM_BYTES
        if spec.layout == "raw" and sizes[name] != needed:
            raise corrupt(array / name, f"has {sizes[name]} bytes, shape {spec.shape} of {spec.stored} needs {needed}")
        if spec.chunk_nbytes > MAX_RATIO * sizes[name]:
            raise corrupt(
                array / name, f"has {sizes[name]} bytes for {spec.chunk_nbytes}, beyond what compresses so well"
            )


def chunk_sizes(array: Path) -> dict[str, int]:
    """Return the sizes of the chunk files that lie in the folder of an array, in bytes, by name.

    Raises:
        CorruptStoreError: one is no file, or holes for the most part, or cannot be looked at.
    """
    sizes = {}
    try:
        for entry in os.scandir(array):
            if not entry.name.startswith(f"c{CHUNK_SEPARATOR}"):
                continue
            where, found = array / entry.name, entry.stat()
            if not stat.S_ISREG(found.st_mode):
                raise corrupt(where, "is no file")
            if found.st_size > SPARSE_ABOVE and found.st_blocks * 512 < found.st_size // 64:
                raise corrupt(where, f"has {found.st_size} bytes, of which {found.st_blocks * 512} are on disk")
            sizes[entry.name] = found.st_size
    except OSError as error:
        raise _unreadable(array, error) from error
    return sizes


def read_small(array: Path, spec: ArraySpec) -> np.ndarray:
    """Return a raw array whole, in its stored type, once its checksum is proved; for those that are small.

    Raises:
        CorruptStoreError: the bytes are not those that were written.
    """
    if spec.layout != "raw" or spec.nbytes > MAX_BESIDE_BYTES:
        raise corrupt(array, f"has {spec.nbytes} bytes in layout {spec.layout}, expected raw and {MAX_BESIDE_BYTES}")
    if not spec.nbytes:
        return np.empty(spec.shape, spec.stored)
    values = read_chunk(array / spec.chunk_files[0])
    return np.frombuffer(values, np.dtype(spec.stored).newbyteorder("<")).reshape(spec.shape)


def read_keys(segment: Path) -> np.ndarray:
    """Return a segment's sample keys (n, 16) uint8, proved against the segment's id, so that no metadata is needed.

    Raises:
        CorruptStoreError: the keys cannot be read, or are not those the segment was named after.
    """
    where = f"{segment}/{KEYS}/{KEYS_CHUNK}"  # strings: with thousands of segments, paths take longer than reading
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
    if raw.get("zarr_format") != 3 or raw.get("node_type") != "array":
        raise corrupt(where, "is no zarr v3 array")
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
    """Return what a chunk file holds, whole, once its checksum is proved.

    Raises:
        CorruptStoreError: it cannot be read, is no file, or does not match its checksum.
    """
    try:
        raw = read_file(where)
    except OSError as error:
        raise _unreadable(where, error) from error
    values, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
    if google_crc32c.value(values) != int.from_bytes(checksum, "little"):
        raise corrupt(where, "does not match its checksum")
    return values


def _unreadable(where: Path, error: OSError) -> CorruptStoreError:
    return CorruptStoreError(f"{where}: cannot be read ({error.strerror}); {REMEDY}")


REMEDY = "remove the segment's folder and encode again"


def corrupt(where: Path | str, fault: str) -> CorruptStoreError:
    """Return the error for a file or folder `where` that is not what was written."""
    return CorruptStoreError(f"{where} {fault}; {REMEDY}")


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _all_match(value: object, pattern: re.Pattern[str]) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and pattern.fullmatch(item) for item in value)
