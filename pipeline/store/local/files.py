"""The files of stores: on this disk here, in a bucket in `remote.mirror`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.errors import StoreError
from pipeline.store.format.layout import find_stores, is_committed
from pipeline.store.format.names import RECIPE_FILE, corrupt
from pipeline.store.format.segment_files import chunk_sizes, read_chunk
from pipeline.store.local.temporary import move_into_place, publish_file, sync, sync_tree, temporary_folder


class StoreFiles:
    """The files of stores on this disk. `Remote` overrides this for stores in a bucket, of which it keeps a mirror.

    All paths are on this disk: those of the files, or of their mirror.
    """

    is_local = True

    def where(self, path: Path) -> str:
        """Return how messages name what is at `path`."""
        return str(path)

    def open(self, store: Path) -> None:
        """Make the recipe of a store readable at its path; raises StoreError where a bucket holds no store."""

    def create(self, store: Path, recipe: str) -> None:
        """Write the recipe of a store, given as its text, unless there is one; StoreError if something else is."""
        if (store / RECIPE_FILE).exists():
            return
        others = [entry.name for entry in own_entries(store) if not entry.name.startswith(".")]
        if others:
            raise StoreError(f"{store} holds {others[0]!r} and no {RECIPE_FILE}; choose an empty folder for the store")
        with temporary_folder(store) as temporary:
            draft = temporary / RECIPE_FILE
            draft.write_text(recipe, encoding="utf-8")
            publish_file(draft, store / RECIPE_FILE)

    def refresh(self, store: Path) -> None:
        """Make the path of a store hold the small files of exactly the segments that are committed now."""

    def holds(self, segment: Path) -> bool:
        """Return whether a segment is committed; the small files of one that is are at its path then."""
        return is_committed(segment)

    def commit(self, written: Path, segment: Path) -> None:
        """Commit the folder `written` as a segment, unless the segment is committed already."""
        sync_tree(written)
        if move_into_place(written, segment, is_committed):
            sync(segment.parent)

    def chunk_sizes(self, array: Path) -> Mapping[str, int]:
        """Return the sizes of an array's chunk files in bytes, by name."""
        return chunk_sizes(array)

    def read_into(self, chunk: Path, out: np.ndarray) -> None:
        """Fill `out`, one axis of uint8, with what a chunk file holds; CorruptStoreError unless that was written."""
        values = read_chunk(chunk)
        if len(values) != len(out):
            raise corrupt(chunk, f"holds {len(values)} bytes, expected {len(out)}")
        out[:] = values

    def read_small(self, file: Path) -> bytes:
        """Return a small file whole; raises FileNotFoundError where there is none."""
        return file.read_bytes()

    def fetch_folder(self, folder: Path) -> None:
        """Make `folder` hold all its files, large ones too."""

    def put_folder(self, folder: Path, *, last: str) -> None:
        """Put all files of `folder` where they belong, the one called `last` last."""


DISK = StoreFiles()


def own_entries(path: Path) -> list[Path]:
    """Return what is in the folder `path` and neither is nor holds a store: all that belongs to a store there."""
    return [entry for entry in sorted(path.iterdir()) if not find_stores(entry)]
