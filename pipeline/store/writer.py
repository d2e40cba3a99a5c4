"""One unit of samples -> one committed segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from pipeline.errors import StoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.codecs import Encoded, Values, dtype_name, encode, storage_dtype
from pipeline.store.format import (
    CHUNK_SEPARATOR,
    KEYS,
    OFFSETS,
    ArraySpec,
    SegmentSpec,
    check_tensor_name,
    is_committed,
    read_array_spec,
    read_segment_spec,
    segment_id,
    segment_nbytes,
)
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


def write_segment(root: Path, keys: np.ndarray, tensors: Mapping[str, Values], storage: str) -> SegmentInfo:
    """Commit the samples `keys` (n, 16) uint8 with their tensors; a segment that is there already is left alone.

    Raises:
        StoreError: keys, names, shapes or dtypes cannot be stored, or the disk refuses; nothing is committed then.
    """
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES or not len(keys):
        raise StoreError(
            f"keys are {keys.dtype} of shape {keys.shape}; expected uint8 of shape (n, {KEY_BYTES}), n > 0"
        )
    for name in tensors:
        check_tensor_name(name)
    final = root / segment_id(keys)
    try:
        if not is_committed(final):
            with scratch(root) as temporary:
                _write_group(temporary, keys, tensors, storage)
                publish(temporary, final, is_committed)
        return _describe(final, storage)
    except OSError as error:
        raise StoreError(
            f"{final}: cannot be written ({error.strerror or error}); nothing of it was kept; make room and run again"
        ) from error


def _write_group(group: Path, keys: np.ndarray, tensors: Mapping[str, Values], storage: str) -> None:
    """Write the arrays first and the group's own metadata last; one tensor at a time is held in its stored form."""
    for name in sorted(tensors):
        encoded = encode(name, tensors[name], len(keys), storage)
        _write_array(group / name, encoded)
        if encoded.offsets is not None:
            offsets = Encoded(ArraySpec(encoded.offsets.shape, "int64", "int64"), encoded.offsets)
            _write_array(group / f"{name}{OFFSETS}", offsets)
    _write_array(group / KEYS, Encoded(ArraySpec(keys.shape, "uint8", "uint8"), np.ascontiguousarray(keys)))
    spec = SegmentSpec(len(keys), tuple(sorted(tensors)))
    zarr.create_group(LocalStore(group), zarr_format=3, attributes=spec.attributes)


def _write_array(path: Path, encoded: Encoded) -> None:
    # Each array is the root of a store of its own: zarr would otherwise write the group's metadata first.
    array = zarr.create_array(
        LocalStore(path),
        shape=encoded.spec.shape,
        chunks=encoded.spec.chunk_shape,
        dtype=encoded.spec.stored,
        serializer=BytesCodec(endian="little"),
        filters=None,
        compressors=[Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": CHUNK_SEPARATOR},
        attributes=encoded.spec.attributes,
        fill_value=0,
        zarr_format=3,
        config={"write_empty_chunks": True},  # also spares the search for emptiness, which is slower than the disk
    )
    if encoded.data.size:
        array[...] = encoded.data


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
