"""Compressed arrays, unpacked once to local scratch and memory-mapped from there.

A chunk is decompressed straight into the mapped file, all cores at it. Files appear whole by rename, so processes may
share a scratch folder; when the byte budget is spent, the segment that was opened longest ago goes.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numcodecs import blosc

from pipeline.errors import StoreError
from pipeline.store.format import CHECKSUM_BYTES, ArraySpec
from pipeline.store.metadata import corrupt, read_chunk
from pipeline.store.scratch import scratch, sweep

SCRATCH_BYTES = 64 << 30
MAX_RATIO = 1 << 14
"""A chunk holds at most so many times the bytes of its file; the compressor reaches a quarter of it, on zeros."""
_BLOSC_HEADER = 16


class Scratch:
    """A folder of unpacked segments within a byte budget.

    Use one for all stores of a process: segments of different recipes have folders of their own.
    """

    def __init__(self, root: Path, budget: int = SCRATCH_BYTES) -> None:
        """Use the folder `root` (made when first needed) for at most `budget` bytes."""
        self.root, self.budget = root, budget
        self._held: OrderedDict[Path, int] | None = None

    def unpack(self, segment: Path, recipe: str, arrays: Mapping[str, ArraySpec]) -> tuple[dict[str, Path], list[Path]]:
        """Return a raw file for each of the compressed `arrays` of `segment`, and the folders given up for their room.

        Who has files of those folders mapped goes on reading them, but keeps their space on disk in use until then.

        Raises:
            StoreError: the arrays exceed the budget, or the folder cannot be written.
            CorruptStoreError: a chunk is not what was written.
        """
        folder = self.root / recipe / segment.name
        needed = sum(spec.nbytes for spec in arrays.values())
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            given_up = self._make_room(folder, needed)
            files = {name: folder / name for name in arrays}
            if not all(_holds(files[name], spec.nbytes) for name, spec in arrays.items()):
                folder.mkdir(parents=True, exist_ok=True)
                with scratch(self.root) as temporary:
                    for name, spec in arrays.items():
                        unpack_array(segment / name, spec, _new_map(temporary / name, spec))
                        (temporary / name).replace(files[name])
        except OSError as error:
            raise StoreError(f"{folder}: cannot be unpacked ({error.strerror or error}); free some space") from error
        return files, given_up

    def _make_room(self, folder: Path, needed: int) -> list[Path]:
        if needed > self.budget:
            raise StoreError(f"a segment unpacks to {needed} bytes, scratch may hold {self.budget}; allow more")
        if self._held is None:
            sweep(self.root)
            found = sorted(self.root.glob("*/*/"), key=lambda path: path.stat().st_mtime)
            self._held = OrderedDict((path, sum(file.stat().st_size for file in path.iterdir())) for path in found)
        self._held[folder] = needed
        self._held.move_to_end(folder)
        given_up = []
        while sum(self._held.values()) > self.budget:
            oldest, _ = self._held.popitem(last=False)
            shutil.rmtree(oldest, ignore_errors=True)
            given_up.append(oldest)
        return given_up


def _holds(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _new_map(file: Path, spec: ArraySpec) -> np.ndarray:
    """Map a new file whose room on disk is reserved: to write to a map on a full disk kills the process."""
    with file.open("wb") as reserved:
        os.posix_fallocate(reserved.fileno(), 0, spec.nbytes)
    return np.memmap(file, spec.stored, "r+", shape=spec.shape)


def check_packed(array: Path, spec: ArraySpec) -> None:
    """Raise CorruptStoreError unless the chunk files claim to hold what the metadata does, in believable sizes.

    To be called before memory or disk is taken for an array.
    """
    for name in spec.chunk_files:
        where = array / name
        with where.open("rb") as file:
            header = file.read(_BLOSC_HEADER)
        size = where.stat().st_size - CHECKSUM_BYTES
        claimed, packed = int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")
        if len(header) < _BLOSC_HEADER or claimed != spec.chunk_nbytes or packed != size:
            raise corrupt(where, f"says to hold {claimed} bytes in {packed}, expected {spec.chunk_nbytes} in {size}")
        if claimed > MAX_RATIO * size:
            raise corrupt(where, f"says to hold {claimed} bytes in {packed}, beyond what compresses so well")


def unpack_array(array: Path, spec: ArraySpec, out: np.ndarray) -> None:
    """Decompress an array into `out`, of its shape and stored type.

    Raises:
        CorruptStoreError: a chunk is not what was written.
    """
    rows = spec.chunk_shape[0]

    def unpack(number: int, name: str) -> None:
        part = out[number * rows : (number + 1) * rows]
        if len(part) == rows:
            _decompress(array / name, spec, part)
        else:  # zarr fills the last chunk up
            whole = np.empty(spec.chunk_shape, spec.stored)
            _decompress(array / name, spec, whole)
            part[...] = whole[: len(part)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(unpack, range(len(spec.chunk_files)), spec.chunk_files))


def _decompress(where: Path, spec: ArraySpec, out: np.ndarray) -> None:
    packed = read_chunk(where)
    try:
        blosc.decompress(packed, out)
    except (RuntimeError, ValueError) as error:
        raise corrupt(where, f"cannot be decompressed ({error})") from error
