"""A cache of raw files, memory-mapped, of segments that are compressed or in a bucket.

Files are mapped while they are filled: a compressed chunk is decompressed straight into its place, a raw one fetched
into it. Files appear whole, by rename, so processes may share a cache. When the byte budget is spent, the least
recently used segment is evicted.
"""

import fcntl
import os
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pipeline.errors import StoreError
from pipeline.store.format.layout import ArraySpec
from pipeline.store.local.temporary import sweep, temporary_folder

CACHE_BYTES = 64 << 30


class SegmentCache:
    """A folder of segments' raw files within a byte budget. Its methods may be called by any thread.

    Use one for all stores of a process: segments of different recipes, or bytes, have different places.
    """

    def __init__(self, root: Path, budget: int = CACHE_BYTES) -> None:
        """Use the folder `root` (made when first needed) for at most `budget` bytes."""
        self.root, self.budget = root, budget
        self._held: OrderedDict[Path, int] | None = None
        self._busy: Counter[Path] = Counter()
        self._changed = threading.Condition()

    def fetch(
        self, place: Path, arrays: Mapping[str, ArraySpec], fill: Callable[[str, np.ndarray], None]
    ) -> tuple[dict[str, Path], list[Path]]:
        """Return a raw file for each of `arrays`, and the places that were evicted for them.

        `place` is their folder, relative to the root. For each file that is missing, `fill` gets the array's name and
        the array, mapped, to write values into. Readers may keep an evicted file mapped; its space is freed when they
        unmap it. Raises StoreError where the arrays exceed the budget, or the folder cannot be written.
        """
        folder = self.root / place
        files = {name: folder / name for name in arrays}
        try:
            with self._room(place, sum(spec.nbytes for spec in arrays.values())) as evicted, _file_lock(folder):
                missing = {name: spec for name, spec in arrays.items() if not _has_size(files[name], spec.nbytes)}
                if missing:
                    with temporary_folder(self.root) as temporary:
                        for name, spec in missing.items():
                            fill(name, _new_map(temporary / name, spec))
                            folder.mkdir(parents=True, exist_ok=True)  # another process may have evicted it
                            (temporary / name).replace(files[name])
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error.strerror or error}); free some space, or lower train.scratch_gb"
            ) from error
        return files, evicted

    def reorder(self, place: Path, *, last: bool) -> None:
        """Make the files of `place` the last to be evicted, or the first."""
        with self._changed:
            if self._held is not None and place in self._held:
                self._held.move_to_end(place, last=last)

    @contextmanager
    def _room(self, place: Path, needed: int) -> Iterator[list[Path]]:
        """Reserve `needed` bytes for `place`; yield the places that were evicted, none of which is being filled."""
        if needed > self.budget:
            raise StoreError(
                f"a segment takes {needed} bytes of scratch, which may hold {self.budget}; raise train.scratch_gb"
            )
        with self._changed:
            evicted = self._evict(place, needed)
            self._busy[place] += 1
        try:
            (self.root / place).mkdir(parents=True, exist_ok=True)
            yield evicted
        finally:
            with self._changed:
                self._busy[place] -= 1
                self._changed.notify_all()

    def _evict(self, place: Path, needed: int) -> list[Path]:
        held = self._held = self._found() if self._held is None else self._held
        evicted = []
        while sum(held.values()) - held.get(place, 0) + needed > self.budget:
            oldest = next((other for other in held if other != place and not self._busy[other]), None)
            if oldest is None:
                self._changed.wait()
                continue
            del held[oldest]
            shutil.rmtree(self.root / oldest, ignore_errors=True)
            evicted.append(oldest)
        held[place] = needed
        held.move_to_end(place)
        return evicted

    def _found(self) -> OrderedDict[Path, int]:
        self.root.mkdir(parents=True, exist_ok=True)
        sweep(self.root)
        found = sorted(self.root.glob("*/*/"), key=lambda path: path.stat().st_mtime)
        return OrderedDict(
            (path.relative_to(self.root), sum(file.stat().st_size for file in path.iterdir())) for path in found
        )


@contextmanager
def _file_lock(folder: Path) -> Iterator[None]:
    """Make other threads and processes that want the same segment wait until it is there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: both fetch it, and the files are the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _new_map(file: Path, spec: ArraySpec) -> np.ndarray:
    """Map a new file whose space on disk is reserved: writing to a map on a full disk kills the process."""
    with file.open("wb") as reserved:
        os.posix_fallocate(reserved.fileno(), 0, spec.nbytes)
    return np.memmap(file, spec.stored, "r+", shape=spec.shape)
