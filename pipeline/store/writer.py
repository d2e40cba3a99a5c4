"""One unit of samples -> one committed segment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES, Recipe
from pipeline.store.codecs import Encoded, Values, dtype_name, encode, storage_dtype
from pipeline.store.format import (
    CHECKSUM_BYTES,
    CHUNK_SEPARATOR,
    CLEVEL,
    KEYS,
    MAX_BESIDE_BYTES,
    MAX_METADATA_BYTES,
    METADATA_FILE,
    OFFSETS,
    RECIPE_FILE,
    SCALES,
    SUMS,
    ArraySpec,
    SegmentSpec,
    check_tensor_name,
    is_committed,
    sample_sums,
    segment_id,
)
from pipeline.store.listing import segment_nbytes
from pipeline.store.metadata import check_chunks, chunk_sizes, read_array_spec, read_metadata, read_segment_spec
from pipeline.store.remote import Remote
from pipeline.store.scratch import publish, scratch


@dataclass(frozen=True)
class SegmentInfo:
    """A committed segment.

    Attributes:
        id: its name, the digest of its ordered keys.
        bytes: size of its files.
        promoted: tensors that left the range of the storage dtype and are stored in a wider one.
    """

    id: str
    bytes: int
    promoted: tuple[str, ...]


def write_segment(
    root: Path,
    keys: np.ndarray,
    tensors: Mapping[str, Values],
    recipe: Recipe,
    set_aside: np.ndarray | None = None,
    remote: Remote | None = None,
) -> SegmentInfo:
    """Commit the samples `keys` (n, 16) uint8 with their tensors; a segment that is there already is left alone.

    `set_aside` (m, 16) are the keys of bad samples of the same unit. With `remote`, `root` is a folder of its mirror.

    Raises:
        StoreError: keys, names, shapes or dtypes cannot be stored, or the disk refuses; nothing is committed then.
    """
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES or not len(keys):
        raise StoreError(
            f"keys are {keys.dtype} of shape {keys.shape}; expected uint8 of shape (n, {KEY_BYTES}), n > 0"
        )
    for name in tensors:
        check_tensor_name(name)
    names = tuple(sorted(tensors))
    bad = () if set_aside is None else tuple(key.tobytes().hex() for key in set_aside)
    encoded = (encode(name, tensors[name], len(keys), recipe.storage) for name in names)
    return commit(root, keys, SegmentSpec(recipe.digest, len(keys), names, bad), encoded, recipe.storage, remote)


def commit(
    root: Path,
    keys: np.ndarray,
    spec: SegmentSpec,
    tensors: Iterable[Encoded],
    storage: str,
    remote: Remote | None = None,
) -> SegmentInfo:
    """Commit the samples `keys` with their `tensors`, in the order that `spec` names them, one at a time in memory.

    Raises:
        StoreError: the disk or the place refuses; nothing is committed then.
    """
    final = root / segment_id(keys)
    try:
        if not is_committed(final) and not (remote and remote.adopt(final)):
            with scratch(root) as temporary:
                arrays = _write_group(temporary, keys, spec, tensors)
                _check_whole(root, temporary, arrays)
                if remote is None:
                    publish(temporary, final, is_committed)
                else:
                    remote.commit(temporary, final)
        return _describe(final, storage)
    except OSError as error:
        raise StoreError(
            f"{final}: cannot be written ({error.strerror or error}); nothing of it was kept; "
            "make room there, or give access, and run again"
        ) from error


def _write_group(group: Path, keys: np.ndarray, spec: SegmentSpec, tensors: Iterable[Encoded]) -> list[str]:
    """Write the arrays first and the group's own metadata, which seals theirs, last; return the arrays' names."""
    sums = np.zeros((len(keys), len(spec.tensors)), np.uint32)
    arrays = [KEYS, SUMS]
    for column, (name, encoded) in enumerate(zip(spec.tensors, tensors, strict=True)):
        sums[:, column] = sample_sums(encoded.data, encoded.offsets)
        _write_array(group / name, encoded.spec, encoded.data)
        for suffix, beside in ((OFFSETS, encoded.offsets), (SCALES, encoded.scales)):
            if beside is not None:
                _write_plain(group / f"{name}{suffix}", beside)
                arrays.append(f"{name}{suffix}")
        arrays.append(name)
    _write_plain(group / KEYS, keys)
    _write_plain(group / SUMS, sums)
    sealed = replace(spec, seal=spec.sealed_over({name: read_metadata(group / name) for name in arrays}))
    zarr.create_group(LocalStore(group), zarr_format=3, attributes=sealed.attributes)
    return arrays


def _check_whole(root: Path, group: Path, arrays: Sequence[str]) -> None:
    """Refuse what cannot be read back, and what lost a part: zarr makes a folder anew that is removed meanwhile.

    Raises:
        StoreError: it cannot be committed.
    """
    try:
        for name in arrays:
            check_chunks(group / name, read_array_spec(group / name), chunk_sizes(group / name))
    except CorruptStoreError as error:
        raise StoreError(f"a segment cannot be committed: {error}") from error
    if not (root / RECIPE_FILE).is_file():
        raise StoreError(f"{root} lost its {RECIPE_FILE} while a segment was written; run again")
    size = (group / METADATA_FILE).stat().st_size
    if size > MAX_METADATA_BYTES:
        raise StoreError(
            f"a segment's metadata has {size} bytes, mostly names of bad samples, at most {MAX_METADATA_BYTES} are "
            "read; lower encode.segment_samples"
        )


def _write_plain(path: Path, data: np.ndarray) -> None:
    if data.nbytes > MAX_BESIDE_BYTES:
        raise StoreError(
            f"{path.name} of a segment has {data.nbytes} bytes, at most {MAX_BESIDE_BYTES} are read; "
            "lower encode.segment_samples"
        )
    _write_array(path, ArraySpec(data.shape, data.dtype.name, data.dtype.name), np.ascontiguousarray(data))


def _write_array(path: Path, spec: ArraySpec, data: np.ndarray) -> None:
    size = data.dtype.itemsize
    zstd = [BloscCodec(typesize=size, cname="zstd", clevel=CLEVEL, shuffle="bitshuffle", blocksize=0)]
    # Each array is the root of a store of its own: zarr would otherwise write the group's metadata first.
    array = zarr.create_array(
        LocalStore(path),
        shape=spec.shape,
        chunks=spec.chunk_shape,
        dtype=spec.stored,
        serializer=BytesCodec(endian="little"),
        filters=None,
        compressors=[*(zstd if spec.layout == "zstd" else []), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": CHUNK_SEPARATOR},
        attributes=spec.attributes,
        dimension_names=spec.dimension_names(path.name),
        fill_value=0,
        zarr_format=3,
        config={"write_empty_chunks": True},  # also spares the search for emptiness, which is slower than the disk
    )
    if not data.size:
        return
    if spec.layout == "zstd":
        array[...] = data
        return
    # zarr would give the chunk the same bytes, after copying the array twice.
    little = data.astype(data.dtype.newbyteorder("<"), copy=False)
    with (path / spec.chunk_files[0]).open("xb", buffering=0) as chunk:
        for part in (little.data, google_crc32c.value(little).to_bytes(CHECKSUM_BYTES, "little")):
            write_whole(chunk, part)


def write_whole(file: RawIOBase, data: memoryview | bytes) -> None:
    """Write all of `data`: a raw file may take less at a time (2 GiB on Linux)."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


def _describe(segment: Path, storage: str) -> SegmentInfo:
    usual = dtype_name(storage_dtype(storage))
    specs = {name: read_array_spec(segment / name) for name in read_segment_spec(segment).tensors}
    return SegmentInfo(
        id=segment.name,
        bytes=segment_nbytes(segment),
        promoted=tuple(
            name for name, spec in specs.items() if spec.torch_dtype.is_floating_point and spec.dtype != usual
        ),
    )
