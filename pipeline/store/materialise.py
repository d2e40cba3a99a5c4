"""Arrays brought to local scratch as raw files, and memory-mapped from there: what is compressed, or lies elsewhere.

Files are mapped while they are filled: a compressed chunk is decompressed straight into its place, a raw one fetched
into it. Files appear whole by rename, so processes may share a scratch folder. When the byte budget is spent, the
segment that was used longest ago goes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numcodecs import blosc

from pipeline.errors import StoreError
from pipeline.store.format import ArraySpec
from pipeline.store.metadata import corrupt
from pipeline.store.scratch import scratch, sweep

SCRATCH_BYTES = 64 << 30
_BLOSC_HEADER = 16


class Scratch:
    """A folder of segments brought here, within a byte budget. Its methods may be called by any thread.

    Use one for all stores of a process: segments of different recipes, or bytes, have folders of their own.
    """

    def __init__(self, root: Path, budget: int = SCRATCH_BYTES) -> None:
        """Use the folder `root` (made when first needed) for at most `budget` bytes."""
        self.root, self.budget = root, budget
        self._held: OrderedDict[Path, int] | None = None
        self._busy: dict[Path, int] = {}
        self._changed = threading.Condition()

    def bring(
        self, place: Path, arrays: Mapping[str, ArraySpec], fill: Callable[[str, np.ndarray], None]
    ) -> tuple[dict[str, Path], list[Path]]:
        """Return a raw file for each of `arrays`, filled where it is not there, and the places given up for their room.

        `place` is where they lie, relative to the root; `fill` gets a name and the array, mapped, to put values into.
        Who has files of places that were given up mapped goes on reading them, but keeps their space in use until then.

        Raises:
            StoreError: the arrays exceed the budget, or the folder cannot be written; or what `fill` raises.
        """
        folder = self.root / place
        files = {name: folder / name for name in arrays}
        try:
            with self._room(place, sum(spec.nbytes for spec in arrays.values())) as given_up, _alone(folder):
                missing = {name: spec for name, spec in arrays.items() if not _holds(files[name], spec.nbytes)}
                if missing:
                    with scratch(self.root) as temporary:
                        for name, spec in missing.items():
                            fill(name, _new_map(temporary / name, spec))
                            folder.mkdir(parents=True, exist_ok=True)  # another process may have given it up
                            (temporary / name).replace(files[name])
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error.strerror or error}); free some space, or lower train.scratch_gb"
            ) from error
        return files, given_up

    def use(self, place: Path) -> None:
        """Note that the files of `place` are used now."""
        self._move(place, last=True)

    def release(self, place: Path) -> None:
        """Note that the files of `place` are not needed for long: they are the first to go."""
        self._move(place, last=False)

    def _move(self, place: Path, *, last: bool) -> None:
        with self._changed:
            if self._held is not None and place in self._held:
                self._held.move_to_end(place, last=last)

    @contextmanager
    def _room(self, place: Path, needed: int) -> Iterator[list[Path]]:
        """Keep `needed` bytes for `place`; give the places that went for them. What others are filling stays."""
        if needed > self.budget:
            raise StoreError(
                f"a segment takes {needed} bytes of scratch, which may hold {self.budget}; raise train.scratch_gb"
            )
        given_up = []
        with self._changed:
            held = self._held = self._found() if self._held is None else self._held
            while sum(held.values()) - held.get(place, 0) + needed > self.budget:
                oldest = next((other for other in held if other != place and other not in self._busy), None)
                if oldest is None:
                    self._changed.wait()
                    continue
                del held[oldest]
                shutil.rmtree(self.root / oldest, ignore_errors=True)
                given_up.append(oldest)
            held[place] = needed
            held.move_to_end(place)
            self._busy[place] = self._busy.get(place, 0) + 1
        try:
            (self.root / place).mkdir(parents=True, exist_ok=True)
            yield given_up
        finally:
            with self._changed:
                self._busy[place] -= 1
                if not self._busy[place]:
                    del self._busy[place]
                self._changed.notify_all()

    def _found(self) -> OrderedDict[Path, int]:
        self.root.mkdir(parents=True, exist_ok=True)
        sweep(self.root)
        found = sorted(self.root.glob("*/*/"), key=lambda path: path.stat().st_mtime)
        return OrderedDict(
            (path.relative_to(self.root), sum(file.stat().st_size for file in path.iterdir())) for path in found
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Have other threads and processes that want the same segment wait until it is there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: both bring it, and the files are the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _holds(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _new_map(file: Path, spec: ArraySpec) -> np.ndarray:
    """Map a new file whose room on disk is reserved: to write to a map on a full disk kills the process."""
    with file.open("wb") as reserved:
        os.posix_fallocate(reserved.fileno(), 0, spec.nbytes)
    return np.memmap(file, spec.stored, "r+", shape=spec.shape)


def unpack_array(array: Path, spec: ArraySpec, out: np.ndarray, read: Callable[[Path], bytes]) -> None:
    """Decompress an array into `out`, of its shape and stored type; `read` gives what a chunk file holds.

    Raises:
        CorruptStoreError: a chunk is not what was written.
    """
    rows = spec.chunk_shape[0]

    def unpack(number: int, name: str) -> None:
        part, packed = out[number * rows : (number + 1) * rows], read(array / name)
        if len(part) == rows:
            _decompress(array / name, packed, spec, part)
        else:  # zarr fills the last chunk up
            whole = np.empty(spec.chunk_shape, spec.stored)
            _decompress(array / name, packed, spec, whole)
            part[...] = whole[: len(part)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(unpack, range(len(spec.chunk_files)), spec.chunk_files))


def _decompress(where: Path, packed: bytes, spec: ArraySpec, out: np.ndarray) -> None:
    claimed, size = int.from_bytes(packed[4:8], "little"), int.from_bytes(packed[12:16], "little")
    if len(packed) < _BLOSC_HEADER or claimed != spec.chunk_nbytes or size != len(packed):
        raise corrupt(where, f"says to hold {claimed} bytes in {size}, expected {spec.chunk_nbytes} in {len(packed)}")
    try:
        blosc.decompress(packed, out)
    except (RuntimeError, ValueError) as error:
        raise corrupt(where, f"cannot be decompressed ({error})") from error
