"""Stores that lie elsewhere: their small files mirrored on this disk, their large ones fetched when they are needed.

A store elsewhere has the layout that it has on a disk. What is small (metadata, keys, checksums, offsets, scales) lies
in a mirror of the same layout, so that whoever reads a store's metadata reads a folder. The chunks of its tensors, the
rest, come to `Scratch`. Beside a mirrored segment's files lies what a listing said of all of them: a segment that was
removed or written anew elsewhere is seen by that, and mirrored again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store.format import (
    CHECKSUM_BYTES,
    MAX_BESIDE_BYTES,
    METADATA_FILE,
    RECIPE_FILE,
    SEGMENT_ID,
    committed_segments,
    is_tensor_name,
)
from pipeline.store.listing import Listed, read_listing, write_listing
from pipeline.store.metadata import corrupt
from pipeline.store.objects import PART_BYTES, Objects
from pipeline.store.scratch import discard, scratch, settle

T = TypeVar("T")
R = TypeVar("R")

REQUESTS = 32
"""Requests in flight at most."""
TRIES = 3
"""How often a chunk is fetched whose bytes are not those that were written."""
_FILE = re.compile(r"(?:([A-Za-z0-9_.\-]*[A-Za-z0-9_\-][A-Za-z0-9_.\-]*)/)?(zarr\.json|c(?:\.\d+)+)")


class Remote:
    """The stores below a place elsewhere; `mirror` is the folder where they seem to lie."""

    def __init__(self, objects: Objects, mirror: Path) -> None:
        """Use the stores below `objects`; nothing is asked for yet, and `mirror` is made when it is needed."""
        self.objects, self.mirror = objects, mirror

    def where(self, path: Path) -> str:
        """Return how messages name what is mirrored at `path`."""
        return f"{self.objects.url}/{self._key(path)}".removesuffix("/.")

    def open(self, store: Path) -> None:
        """Mirror the recipe of a store.

        Raises:
            StoreError: no store is there, or the place cannot be read; the message says what to set.
        """
        if not self.find(store):
            raise StoreError(
                f"{self.where(store)}: no store is here; encode first (encode.store), or name another place"
            )

    def find(self, store: Path) -> bool:
        """Mirror the recipe of a store if there is one, and tell whether there is; raises as `open`."""
        try:
            text = self.objects.read(self._key(store / RECIPE_FILE))
        except FileNotFoundError:
            return False
        store.mkdir(parents=True, exist_ok=True)
        with scratch(store) as temporary:
            (temporary / RECIPE_FILE).write_bytes(text)
            (temporary / RECIPE_FILE).replace(store / RECIPE_FILE)
        return True

    def create(self, store: Path, recipe: str) -> None:
        """Begin a store of the recipe with this text, unless there is one; mirror the recipe that is there then.

        Raises:
            StoreError: segments without a recipe are there, or nothing can be written.
        """
        if self.find(store):
            return
        if self._listed(store):
            raise StoreError(
                f"{self.where(store)} has segments and no {RECIPE_FILE}; choose another place for the store"
            )
        with scratch(store) as temporary:
            (temporary / RECIPE_FILE).write_text(recipe, encoding="utf-8")
            self.objects.put(self._key(store / RECIPE_FILE), temporary / RECIPE_FILE, anew=True)
        self.open(store)

    def refresh(self, store: Path) -> None:
        """Make the mirror of a store hold the small files of exactly the segments that are committed elsewhere now."""
        listed = {name: files for name, files in self._listed(store).items() if METADATA_FILE in files}
        for name in committed_segments(store):
            if name not in listed:
                discard(store / name)
        changed = {store / name: files for name, files in listed.items() if read_listing(store / name) != files}
        _at_once(lambda item: self._mirror(*item), changed.items())

    def adopt(self, segment: Path) -> bool:
        """Mirror one segment if it is committed elsewhere, and tell whether it is."""
        files = self._listed(segment.parent, segment.name).get(segment.name, {})
        if METADATA_FILE not in files:
            return False
        self._mirror(segment, files)
        return True

    def commit(self, written: Path, segment: Path) -> None:
        """Put the files of a segment from the folder `written`, its own metadata last, and have them in the mirror.

        Its large files are removed from `written`. A kill before the end leaves files elsewhere that belong to no
        segment, until the same segment is written again.
        """
        files = {str(path.relative_to(written)): path for path in sorted(written.rglob("*")) if path.is_file()}
        key, sizes = self._key(segment), {name: file.stat().st_size for name, file in files.items()}
        arrays = [name for name in files if name != METADATA_FILE]
        tags = _at_once(lambda name: self.objects.put(f"{key}/{name}", files[name]), arrays)
        last = self.objects.put(f"{key}/{METADATA_FILE}", files[METADATA_FILE], anew=True)
        if last is None:  # another writer of this unit was first; which bytes are there, the place says
            self.adopt(segment)
            return
        for name in filter(_is_large, arrays):
            files[name].unlink()
        write_listing(
            written,
            {
                name: Listed(sizes[name], tag or "")
                for name, tag in zip([*arrays, METADATA_FILE], [*tags, last], strict=True)
            },
        )
        settle(written, segment, _listed_as(read_listing(written)))

    def sizes(self, array: Path) -> dict[str, int]:
        """Return the sizes of the chunk files of a mirrored array, in bytes, by name."""
        listed, start = read_listing(array.parent), f"{array.name}/c"
        return {name.partition("/")[2]: file.size for name, file in listed.items() if name.startswith(start)}

    def read(self, chunk: Path) -> bytes:
        """Return what a chunk file holds, whole, once its checksum is proved.

        Raises:
            CorruptStoreError: other bytes are there than were written.
        """
        size = self.sizes(chunk.parent)[chunk.name] - CHECKSUM_BYTES
        values = np.empty(max(0, size), np.uint8)
        self.copy(chunk, values)
        return values.tobytes()

    def copy(self, chunk: Path, out: np.ndarray) -> None:
        """Fill `out`, one axis of uint8, with what a chunk file holds, and prove its checksum; raises as `read`."""
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
        """Return what the file that is mirrored at `file` holds elsewhere; raises FileNotFoundError without one."""
        return self.objects.read(self._key(file))

    def bring(self, folder: Path) -> None:
        """Make a folder of the mirror hold every file that lies below it elsewhere, large ones too."""
        start = f"{self._key(folder)}/"
        files = {path.removeprefix(start): listed for path, listed in self.objects.list(start.rstrip("/"))}
        if read_listing(folder) == files:
            return
        with scratch(folder.parent) as temporary:
            for name, listed in files.items():
                if ".." in Path(name).parts:
                    raise corrupt(f"{self.where(folder)}/{name}", "is no file of this folder")
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                with (temporary / name).open("wb") as file:
                    for begin in range(0, listed.size, PART_BYTES):
                        end = min(begin + PART_BYTES, listed.size)
                        file.write(self.objects.read_part(f"{start}{name}", begin, end))
            write_listing(temporary, files)
            if folder.exists():
                discard(folder)
            if files:
                settle(temporary, folder, _listed_as(files))

    def put(self, folder: Path, *, last: str) -> None:
        """Put all files of a folder of the mirror where they belong, the one called `last` last."""
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in sorted(files, key=lambda name: name == last):
            self.objects.put(f"{self._key(folder)}/{name}", folder / name)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.mirror).as_posix()

    def _listed(self, store: Path, below: str = "") -> dict[str, dict[str, Listed]]:
        """Return what is listed of each segment of a store, committed or not, by the paths within it."""
        start, segments = self._key(store), dict[str, dict[str, Listed]]()
        start = "" if start == "." else f"{start}/"
        for path, listed in self.objects.list(f"{start}{below}".rstrip("/")):
            segment, _, name = path.removeprefix(start).partition("/")
            if name and SEGMENT_ID.fullmatch(segment):
                segments.setdefault(segment, {})[name] = listed
        return segments

    def _mirror(self, segment: Path, files: Mapping[str, Listed]) -> None:
        """Fetch the small files of a segment; what else is listed of it is left for `verify` to find."""
        key = self._key(segment)
        with scratch(segment.parent) as temporary:
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
            write_listing(temporary, files)
            settle(temporary, segment, _listed_as(files))


def _listed_as(files: Mapping[str, Listed]) -> Callable[[Path], bool]:
    return lambda segment: read_listing(segment) == files


def _is_large(name: str) -> bool:
    """Tell whether a file of a segment is a chunk of a tensor."""
    array, _, file = name.rpartition("/")
    return is_tensor_name(array) and file != METADATA_FILE


def _at_once(action: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what `action` gives for each item, many at a time; the first error ends it."""
    with ThreadPoolExecutor(REQUESTS, "remote") as pool:
        try:
            return list(pool.map(action, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@functools.cache
def _fetchers() -> ThreadPoolExecutor:
    """What fetches parts of chunks, for all stores of the process: never more than so many lie in memory."""
    return ThreadPoolExecutor(8, "fetcher")
