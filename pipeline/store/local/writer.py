"""One unit of samples -> one committed segment."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store.format import names
from pipeline.store.format.codec import FLOATS
from pipeline.store.format.codecs import parse_storage
from pipeline.store.format.layout import ArraySpec, EncodedTensor, sample_bounds, sample_sums, segment_id
from pipeline.store.format.metadata import SegmentSpec, read_array_spec, read_segment_spec
from pipeline.store.format.segment_files import check_chunks, chunk_sizes, folder_nbytes
from pipeline.store.local.files import DISK, StoreFiles
from pipeline.store.local.temporary import temporary_folder


@dataclass(frozen=True)
class SegmentInfo:
    """A committed segment.

    Attributes:
        id: its name, the digest of its ordered keys.
        bytes: size of its files.
        promoted: tensors that exceed the range of the storage dtype and are stored in a wider one.
    """

    id: str
    bytes: int
    promoted: tuple[str, ...]


def commit(
    root: Path,
    keys: np.ndarray,
    spec: SegmentSpec,
    tensors: Iterable[EncodedTensor],
    storage: str,
    files: StoreFiles = DISK,
) -> SegmentInfo:
    """Commit the samples `keys` with their `tensors`, in the order of `spec`, one at a time in memory.

    Raises StoreError where the disk or the bucket refuses; nothing is committed then.
    """
    final = root / segment_id(keys)
    try:
        if not files.holds(final):
            with temporary_folder(root) as temporary:
                arrays = _write_group(temporary, keys, spec, tensors)
                _check_whole(root, temporary, arrays)
                files.commit(temporary, final)
        return _describe(final, storage)
    except OSError as error:
        raise StoreError(
            f"{final}: cannot be written ({error.strerror or error}); nothing of it was kept; "
            "make room there, or give access, and run again"
        ) from error


def write_group(group: Path, spec: SegmentSpec, arrays: Mapping[str, object]) -> None:
    """Write the metadata of a segment, sealed over that of its `arrays`, which exist already."""
    import zarr  # noqa: PLC0415 (slow, and only writing needs it)
    from zarr.storage import LocalStore  # noqa: PLC0415

    zarr.create_group(LocalStore(group), zarr_format=3, attributes=spec.sealed(arrays).attributes)


def _write_group(group: Path, keys: np.ndarray, spec: SegmentSpec, tensors: Iterable[EncodedTensor]) -> list[str]:
    """Write the arrays first and the group's own metadata last; return the arrays' names."""
    sums = np.zeros((len(keys), len(spec.tensors)), np.uint32)
    arrays = {}
    for column, (name, encoded) in enumerate(zip(spec.tensors, tensors, strict=True)):
        sums[:, column] = sample_sums(encoded.data, sample_bounds(np.arange(len(keys)), encoded.offsets))
        arrays[name] = _write_array(group / name, encoded.spec, encoded.data)
        offsets = {} if encoded.offsets is None else {names.OFFSETS: encoded.offsets}
        for suffix, beside in {**offsets, **encoded.beside}.items():
            arrays[f"{name}{suffix}"] = _write_plain(group / f"{name}{suffix}", beside)
    arrays[names.KEYS] = _write_plain(group / names.KEYS, keys)
    arrays[names.SUMS] = _write_plain(group / names.SUMS, sums)
    write_group(group, spec, arrays)
    return list(arrays)


def _check_whole(root: Path, group: Path, arrays: Sequence[str]) -> None:
    """Raise StoreError where the written segment could not be read back, or lost a part meanwhile."""
    try:
        for name in arrays:
            check_chunks(group / name, read_array_spec(group / name), chunk_sizes(group / name))
    except CorruptStoreError as error:
        raise StoreError(f"a segment cannot be committed: {error}") from error
    if not (root / names.RECIPE_FILE).is_file():
        raise StoreError(f"{root} lost its {names.RECIPE_FILE} while a segment was written; run again")
    size = (group / names.METADATA_FILE).stat().st_size
    if size > names.MAX_METADATA_BYTES:
        raise StoreError(
            f"a segment's metadata has {size} bytes, mostly names of bad samples, at most {names.MAX_METADATA_BYTES} "
            "are read; lower encode.segment_samples"
        )


def _write_plain(path: Path, data: np.ndarray) -> dict[str, Any]:
    if data.nbytes > names.MAX_BESIDE_BYTES:
        raise StoreError(
            f"{path.name} of a segment has {data.nbytes} bytes, at most {names.MAX_BESIDE_BYTES} are read; "
            "lower encode.segment_samples"
        )
    return _write_array(path, ArraySpec(data.shape, data.dtype.name, data.dtype.name), data)


def _write_array(path: Path, spec: ArraySpec, data: np.ndarray) -> dict[str, Any]:
    """Write an array, and return its metadata."""
    import zarr  # noqa: PLC0415 (slow, and only writing needs it)
    from zarr.storage import LocalStore  # noqa: PLC0415

    metadata = spec.metadata(path.name)
    # Each array is the root of a store of its own: zarr would otherwise write the group's metadata first.
    array = zarr.create_array(
        LocalStore(path),
        shape=spec.shape,
        chunks=spec.chunk_shape,
        dtype=spec.stored,
        serializer={"name": "bytes", "configuration": {"endian": "little"}},
        filters=None,
        compressors=metadata["codecs"][1:],
        chunk_key_encoding={"name": "default", "separator": names.CHUNK_SEPARATOR},
        attributes=metadata["attributes"],
        dimension_names=metadata["dimension_names"],
        fill_value=0,
        zarr_format=3,
        config={"write_empty_chunks": True},  # also spares the search for emptiness, which is slower than the disk
    )
    if data.size and not spec.codec.is_mappable:
        array[...] = data
    elif data.size:
        # zarr would give the chunk the same bytes, after copying the array twice.
        little = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
        with (path / spec.chunk_files[0]).open("xb") as chunk:
            chunk.write(little.data)
            chunk.write(google_crc32c.value(little).to_bytes(names.CHECKSUM_BYTES, "little"))
    return metadata


def _describe(segment: Path, storage: str) -> SegmentInfo:
    usual = parse_storage(storage)[1][0]
    specs = {name: read_array_spec(segment / name) for name in read_segment_spec(segment).tensors}
    promoted = [name for name, spec in specs.items() if spec.dtype in FLOATS and spec.dtype != usual]
    return SegmentInfo(segment.name, folder_nbytes(segment), tuple(promoted))
