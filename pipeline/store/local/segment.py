"""Opening a segment: its metadata is proved, then its arrays are mapped.

The one chunk file of a mappable codec is the array, so its memory map is the tensor: no file descriptor is held, and no
memory but the page cache's. Arrays that are compressed or in a bucket are mapped from a `SegmentCache`.

Functions raise CorruptStoreError where a file is not what was written, and StoreError where arrays cannot be fetched,
for want of room or of a server.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.format.layout import ArraySpec
from pipeline.store.format.metadata import SegmentSpec, read_arrays, read_segment_spec
from pipeline.store.format.names import CHECKSUM_BYTES, KEYS, OFFSETS, RECIPE_FILE, SUMS, corrupt
from pipeline.store.format.segment_files import check_chunks, chunk_sizes, read_small_array
from pipeline.store.local.files import DISK, StoreFiles
from pipeline.store.local.segment_cache import SegmentCache
from pipeline.store.local.stored_tensor import StoredTensor, typed

IN_MEMORY_BYTES = 4 << 30
"""Size that the compressed arrays of one segment may unpack to in memory, without a cache."""


@dataclass
class Segment:
    """The tensors of one segment by name, and which of its samples were checked.

    Attributes:
        path: its folder, or that of its mirror.
        tensors: mapped; of an outline, on torch's meta device: shapes without values.
        cached: how those are stored that are mapped from a cache, because they are compressed or in a bucket.
        place: their folder in a cache; bytes that differ have places that differ.
        checked: which samples were checked, (n,) bool.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    cached: Mapping[str, ArraySpec] = field(repr=False)
    place: Path
    checked: np.ndarray = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of its tensors in memory maps, in bytes; all of them or none are cached."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def check(self, rows: np.ndarray) -> None:
        """Raise CorruptStoreError unless `rows` hold the bytes that were written; each row is checked once."""
        rows = rows[~self.checked[rows]]
        for name, tensor in self.tensors.items() if len(rows) else ():
            if wrong := tensor.wrong(rows):
                raise corrupt(self.path / name, f"has other bytes in row {wrong[0]} than were written")
        self.checked[rows] = True


def outline_segment(path: Path, recipe: str, files: StoreFiles = DISK) -> Segment:
    """Return a segment of the recipe with the digest `recipe`, all but the values of its tensors."""
    spec = read_segment_spec(path)
    if spec.recipe != recipe:
        raise corrupt(path, f"was written under recipe {spec.recipe}, its store's {RECIPE_FILE} is {recipe}")
    arrays = read_arrays(path, spec)
    for name, one in arrays.items():
        check_chunks(path / name, one, (files.chunk_sizes if name in spec.tensors else chunk_sizes)(path / name))
    beside, tensors = _read_beside(path, spec, arrays), {}
    for column, name in enumerate(spec.tensors):
        one = arrays[name]
        tensors[name] = StoredTensor(
            typed(torch.empty(one.shape, dtype=getattr(torch, one.stored), device="meta"), one),
            one,
            beside.get(f"{name}{OFFSETS}"),
            {suffix: torch.from_numpy(beside[f"{name}{suffix}"].copy()) for suffix in one.codec.beside},
            beside[SUMS][:, column],
        )
        _check_shapes(path / name, tensors[name], spec.samples)
    specs = {name: arrays[name] for name in spec.tensors}
    cached = {name: one for name, one in specs.items() if one.nbytes and not (files.is_local and one.codec.is_mappable)}
    place = Path(recipe, f"{path.name}-{google_crc32c.value(np.ascontiguousarray(beside[SUMS])):08x}")
    return Segment(path, tensors, cached, place, np.zeros(spec.samples, np.bool_))


def open_segment(path: Path, recipe: str, cache: SegmentCache | None = None, files: StoreFiles = DISK) -> Segment:
    """Return a segment of the recipe with the digest `recipe`, mapped."""
    return map_segment(outline_segment(path, recipe, files), cache, files)[0]


def map_segment(outline: Segment, cache: SegmentCache | None, files: StoreFiles) -> tuple[Segment, list[Path]]:
    """Return a segment with its tensors mapped, none of its samples checked, and the places evicted for it."""
    raw_files, evicted = fetch(outline, cache, files)
    try:
        tensors = {
            name: replace(tensor, values=_map(outline.path / name, tensor.spec, raw_files, files))
            for name, tensor in outline.tensors.items()
        }
    except StoreError:
        if all(file.exists() for file in raw_files.values()):
            raise
        return map_segment(outline, cache, files)  # another process evicted them in between
    return replace(outline, tensors=tensors, checked=np.zeros_like(outline.checked)), evicted


def fetch(segment: Segment, cache: SegmentCache | None, files: StoreFiles) -> tuple[dict[str, Path], list[Path]]:
    """Return the raw files in the cache of the arrays that a segment has there, and the places evicted for them."""

    def fill(name: str, out: np.ndarray) -> None:
        _read_array(segment.path / name, segment.cached[name], out, files)

    if segment.cached and cache is not None:
        return cache.fetch(segment.place, segment.cached, fill)
    if segment.cached and (segment.nbytes > IN_MEMORY_BYTES or not files.is_local):
        raise StoreError(
            f"{segment.path} takes {segment.nbytes} bytes, at most {IN_MEMORY_BYTES} of a local store without "
            "a scratch; give one"
        )
    return {}, []


def _read_array(array: Path, spec: ArraySpec, out: np.ndarray, files: StoreFiles) -> None:
    """Fill `out`, of the array's shape and stored type, from its chunk files."""
    if spec.codec.is_mappable:
        files.read_into(array / spec.chunk_files[0], out.reshape(-1).view(np.uint8))
        return
    rows, sizes = spec.chunk_shape[0], files.chunk_sizes(array)

    def unpack(number: int, name: str) -> None:
        packed = np.empty(max(0, sizes.get(name, 0) - CHECKSUM_BYTES), np.uint8)
        files.read_into(array / name, packed)
        part = out[number * rows : (number + 1) * rows]
        if len(part) == rows:
            spec.codec.decompress(array / name, packed, part)
        else:  # zarr fills the last chunk up
            whole = np.empty(spec.chunk_shape, spec.stored)
            spec.codec.decompress(array / name, packed, whole)
            part[...] = whole[: len(part)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(unpack, range(spec.chunks), spec.chunk_files))


def _read_beside(path: Path, spec: SegmentSpec, arrays: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Read the checksums of samples, the offsets and the codecs' arrays, whose types and sizes are fixed."""
    types = {SUMS: "uint32"}
    for name in spec.tensors:
        types |= {} if arrays[name].axis is None else {f"{name}{OFFSETS}": "int64"}
        types |= {f"{name}{suffix}": stored for suffix, stored in arrays[name].codec.beside.items()}
    read = {}
    for name, stored in types.items():
        array = arrays[name]
        if array.stored != stored or (name == SUMS and array.shape != (spec.samples, len(spec.tensors))):
            raise corrupt(path / name, f"has shape {array.shape} of {array.stored} for {spec.samples} samples")
        read[name] = read_small_array(path / name, array)
    if arrays[KEYS] != ArraySpec((spec.samples, KEY_BYTES), "uint8", "uint8"):
        raise corrupt(path / KEYS, f"is {arrays[KEYS]}, expected raw uint8 of shape {(spec.samples, KEY_BYTES)}")
    return read


def _check_shapes(array: Path, tensor: StoredTensor, samples: int) -> None:
    offsets, entries = tensor.offsets, len(tensor.values)
    if offsets is not None:
        in_order = offsets.ndim == 1 and len(offsets) > 0 and offsets[0] == 0
        if not in_order or offsets[-1] != entries or (offsets[1:] < offsets[:-1]).any():
            raise CorruptStoreError(f"{array}{OFFSETS} does not divide the {entries} entries of {array.name}")
    if len(tensor) != samples:
        raise CorruptStoreError(f"{array} has {len(tensor)} samples, its segment {samples}; encode again")
    for suffix, one in tensor.beside.items():
        axes = zip(one.shape, tensor.values.shape, strict=False)
        if one.ndim != tensor.values.ndim or any(length not in (1, whole) for length, whole in axes):
            raise CorruptStoreError(
                f"{array}{suffix} has shape {tuple(one.shape)}, its values {tuple(tensor.values.shape)}"
            )


def _map(array: Path, spec: ArraySpec, raw_files: Mapping[str, Path], files: StoreFiles) -> Tensor:
    if not spec.nbytes:
        values = torch.empty(spec.shape, dtype=getattr(torch, spec.stored))
    elif spec.codec.is_mappable or array.name in raw_files:
        # A private mapping: unlike mmap.mmap it keeps no descriptor open, of which a large store would need thousands.
        file = raw_files.get(array.name) or array / spec.chunk_files[0]
        try:
            raw = torch.from_file(str(file), shared=False, size=spec.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise StoreError(f"{file}: cannot be mapped ({error}); look at its permissions") from error
        values = raw.view(getattr(torch, spec.stored)).view(spec.shape)
    else:
        try:
            plain = np.empty(spec.shape, spec.stored)
        except MemoryError as error:
            raise StoreError(f"{array} unpacks to {spec.nbytes} bytes; give a scratch on disk") from error
        _read_array(array, spec, plain, files)
        values = torch.from_numpy(plain)
    return typed(values, spec)
