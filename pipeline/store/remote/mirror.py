"""Stores in a bucket: their small files mirrored on this disk, their large ones fetched when they are needed.

A store in a bucket has the layout that it has on a disk. Small files (metadata, keys, checksums, offsets, scales) are
in a mirror of the same layout, so that reading a store's metadata is reading a folder. The chunks of its tensors go to
a `SegmentCache`. Beside a mirrored segment's files is the listing of all of them: it shows that a segment was removed
or written anew in the bucket, and the segment is mirrored again.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store.format.layout import committed_segments, is_committed, is_tensor_name
from pipeline.store.format.names import (
    CHECKSUM_BYTES,
    MAX_BESIDE_BYTES,
    METADATA_FILE,
    RECIPE_FILE,
    SEGMENT_ID,
    corrupt,
)
from pipeline.store.format.segment_files import ListedFile, read_listing, write_listing
from pipeline.store.local.files import StoreFiles
from pipeline.store.local.temporary import discard, move_into_place, temporary_folder
from pipeline.store.remote.bucket import PART_BYTES, ObjectStore

T = TypeVar("T")
R = TypeVar("R")

REQUESTS = 32
"""Requests in flight at most."""
TRIES = 3
"""Attempts to fetch a chunk that does not match its checksum."""
_FILE = re.compile(r"(?:([A-Za-z0-9_.\-]*[A-Za-z0-9_\-][A-Za-z0-9_.\-]*)/)?(zarr\.json|c(?:\.\d+)+)")


class Remote(StoreFiles):
    """The files of the stores in a bucket; paths are those in their mirror, below the folder `mirror`."""

    is_local = False

    def __init__(self, objects: ObjectStore, mirror: Path) -> None:
        """Use the stores in `objects`; no request is made yet, and `mirror` is made when it is needed."""
        self.objects, self.mirror = objects, mirror

    def where(self, path: Path) -> str:
        return f"{self.objects.url}/{self._key(path)}".removesuffix("/.")

    def open(self, store: Path) -> None:
        if not self.find(store):
            raise StoreError(
                f"{self.where(store)}: no store is here; encode first (encode.store), or name another place"
            )

    def find(self, store: Path) -> bool:
        """Mirror the recipe of a store if there is one, and return whether there is; raises as `open`."""
        try:
            text = self.objects.read(self._key(store / RECIPE_FILE))
        except FileNotFoundError:
            return False
        store.mkdir(parents=True, exist_ok=True)
        with temporary_folder(store) as temporary:
            (temporary / RECIPE_FILE).write_bytes(text)
            (temporary / RECIPE_FILE).replace(store / RECIPE_FILE)
        return True

    def create(self, store: Path, recipe: str) -> None:
        if self.find(store):
            return
        if self._listed(store):
            raise StoreError(
                f"{self.where(store)} has segments and no {RECIPE_FILE}; choose another place for the store"
            )
        with temporary_folder(store) as temporary:
            (temporary / RECIPE_FILE).write_text(recipe, encoding="utf-8")
            self.objects.put(self._key(store / RECIPE_FILE), temporary / RECIPE_FILE, anew=True)
        self.open(store)

    def refresh(self, store: Path) -> None:
        listed = {name: files for name, files in self._listed(store).items() if METADATA_FILE in files}
        for name in committed_segments(store):
            if name not in listed:
                discard(store / name)
        changed = {store / name: files for name, files in listed.items() if read_listing(store / name) != files}
        _map_in_threads(lambda item: self._mirror(*item), changed.items())

    def holds(self, segment: Path) -> bool:
        if is_committed(segment):
            return True
        files = self._listed(segment.parent, segment.name).get(segment.name, {})
        if METADATA_FILE not in files:
            return False
        self._mirror(segment, files)
        return True

    def commit(self, written: Path, segment: Path) -> None:
        # A kill before the end leaves files that belong to no segment, until the same segment is written again.
        files = {str(path.relative_to(written)): path for path in sorted(written.rglob("*")) if path.is_file()}
        key, sizes = self._key(segment), {name: file.stat().st_size for name, file in files.items()}
        arrays = [name for name in files if name != METADATA_FILE]
        tags = _map_in_threads(lambda name: self.objects.put(f"{key}/{name}", files[name]), arrays)
        last = self.objects.put(f"{key}/{METADATA_FILE}", files[METADATA_FILE], anew=True)
        if last is None:  # another writer of this unit was first; mirror what it wrote
            self.holds(segment)
            return
        for name in filter(_is_large, arrays):
            files[name].unlink()
        tag_of = dict(zip([*arrays, METADATA_FILE], [*tags, last], strict=True))
        listed = {name: ListedFile(sizes[name], tag or "") for name, tag in tag_of.items()}
        _put_mirror(written, segment, listed)

    def chunk_sizes(self, array: Path) -> dict[str, int]:
        listed, start = read_listing(array.parent), f"{array.name}/c"
        return {name.partition("/")[2]: file.size for name, file in listed.items() if name.startswith(start)}

    def read_into(self, chunk: Path, out: np.ndarray) -> None:
        key = self._key(chunk)

        def fetch(begin: int) -> bytes:
            end = min(begin + PART_BYTES, len(out) + CHECKSUM_BYTES)
            part = self.objects.read_part(key, begin, end)
            values = part[: max(0, len(out) - begin)]
            out[begin : begin + len(values)] = np.frombuffer(values, np.uint8)
            return bytes(part[len(values) :])

        for _ in range(TRIES):
            checksum = b"".join(_fetchers().map(fetch, range(0, len(out) + CHECKSUM_BYTES, PART_BYTES)))
            if google_crc32c.value(out) == int.from_bytes(checksum, "little"):
                return
        raise corrupt(self.where(chunk), f"does not match its checksum, fetched {TRIES} times")

    def read_small(self, file: Path) -> bytes:
        return self.objects.read(self._key(file))

    def fetch_folder(self, folder: Path) -> None:
        start = f"{self._key(folder)}/"
        files = {path.removeprefix(start): listed for path, listed in self.objects.list(start.rstrip("/"))}
        if read_listing(folder) == files:
            return
        with temporary_folder(folder.parent) as temporary:
            for name, listed in files.items():
                if ".." in Path(name).parts:
                    raise corrupt(f"{self.where(folder)}/{name}", "is no file of this folder")
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                with (temporary / name).open("wb") as file:
                    for begin in range(0, listed.size, PART_BYTES):
                        end = min(begin + PART_BYTES, listed.size)
                        file.write(self.objects.read_part(f"{start}{name}", begin, end))
            if folder.exists():
                discard(folder)
            if files:
                _put_mirror(temporary, folder, files)

    def put_folder(self, folder: Path, *, last: str) -> None:
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in sorted(files, key=lambda name: name == last):
            self.objects.put(f"{self._key(folder)}/{name}", folder / name)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.mirror).as_posix()

    def _listed(self, store: Path, below: str = "") -> dict[str, dict[str, ListedFile]]:
        """Return what is listed of each segment of a store, committed or not, by the paths within it."""
        start, segments = self._key(store), dict[str, dict[str, ListedFile]]()
        start = "" if start == "." else f"{start}/"
        for path, listed in self.objects.list(f"{start}{below}".rstrip("/")):
            segment, _, name = path.removeprefix(start).partition("/")
            if name and SEGMENT_ID.fullmatch(segment):
                segments.setdefault(segment, {})[name] = listed
        return segments

    def _mirror(self, segment: Path, files: Mapping[str, ListedFile]) -> None:
        """Fetch the small files of a segment; other listed files are left for `verify` to find."""
        key = self._key(segment)
        with temporary_folder(segment.parent) as temporary:
            for name, listed in files.items():
                known = _FILE.fullmatch(name)
                if known is None or _is_large(name):
                    continue
                if listed.size > MAX_BESIDE_BYTES + CHECKSUM_BYTES:
                    raise corrupt(f"{self.where(segment)}/{name}", f"has {listed.size} bytes")
                (temporary / name).parent.mkdir(exist_ok=True)
                try:
                    (temporary / name).write_bytes(self.objects.read(f"{key}/{name}"))
                except FileNotFoundError:
                    raise CorruptStoreError(
                        f"{self.where(segment)}/{name} is listed and not there; was it removed meanwhile? Start again"
                    ) from None
            _put_mirror(temporary, segment, files)


def _put_mirror(temporary: Path, folder: Path, files: Mapping[str, ListedFile]) -> None:
    """Add the listing to a mirrored folder, and rename it to `folder`, unless that is the same mirror already."""
    write_listing(temporary, files)
    move_into_place(temporary, folder, lambda there: read_listing(there) == files)


def _is_large(name: str) -> bool:
    """Return whether a file of a segment is a chunk of a tensor."""
    array, _, file = name.rpartition("/")
    return is_tensor_name(array) and file != METADATA_FILE


def _map_in_threads(action: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the results of `action` for all items, many at a time; the first error ends it."""
    with ThreadPoolExecutor(REQUESTS, "remote") as pool:
        try:
            return list(pool.map(action, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@functools.cache
def _fetchers() -> ThreadPoolExecutor:
    """Return the threads that fetch parts of chunks, shared by the process: they bound the parts in memory."""
    return ThreadPoolExecutor(8, "fetcher")
