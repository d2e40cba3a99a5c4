"""A folder of immutable segments that share one recipe."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.errors import StaleStoreError, StoreError
from pipeline.keys import KEY_BYTES, Recipe
from pipeline.store.codecs import Values, check_storage
from pipeline.store.format import (
    FORMAT,
    RECIPE_FILE,
    committed_segments,
    find_stores,
    is_committed,
    segment_id,
)
from pipeline.store.index import KeyIndex, Rows
from pipeline.store.listing import segment_nbytes
from pipeline.store.metadata import read_recipe, read_segment_spec
from pipeline.store.remote import Remote
from pipeline.store.rewrite import Change, Progress, apply
from pipeline.store.scratch import claim, discard, hold, publish_file, scratch, sweep
from pipeline.store.writer import SegmentInfo, write_segment


class Store:
    """The states of one recipe. Any number of processes may write to it and read from it at the same time.

    What other processes commit is seen after `refresh`. Segments are removed or merged under `alone` only, when
    nobody writes; a store that `create` gave counts as writing for as long as it exists.
    """

    def __init__(self, path: Path, recipe: Recipe, remote: Remote | None = None) -> None:
        """Use `Store.create` or `Store.open`, which prove that `path` holds states of `recipe`."""
        self.path = path
        self.recipe = recipe
        self.remote = remote
        self._is_mirrored = False
        self._index: KeyIndex | None = None

    @classmethod
    def create(cls, path: Path, recipe: Recipe, remote: Remote | None = None) -> Store:
        """Open the store at `path` for writing, and make it if nothing is there; leftovers of killed writers go.

        With `remote`, the store lies there, and `path` is a folder of its mirror.

        Raises:
            StaleStoreError: a store of another recipe is there.
            StoreError: the folder holds something else, or cannot be written, or its segments are being removed.
        """
        check_storage(recipe.storage)
        if recipe.format != FORMAT:
            raise StoreError(f"recipe.format is {recipe.format}; this version writes format {FORMAT}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            sweep(path)
            if remote is not None:
                remote.create(path, recipe.to_json())
            elif not (path / RECIPE_FILE).exists():
                _write_recipe(path, recipe)
        except OSError as error:
            raise StoreError(f"{path}: no store can be made here ({error.strerror}); choose another folder") from error
        store = cls.open(path, recipe, remote)
        try:
            held = hold(path)
        except BlockingIOError as error:
            raise StoreError(f"{path}: {error.strerror}; wait for its end and run again") from error
        if held is not None:
            weakref.finalize(store, os.close, held)
        return store

    @classmethod
    def open(cls, path: Path, expected: Recipe | None = None, remote: Remote | None = None) -> Store:
        """Open the store at `path`, of the recipe `expected` if one is given.

        With `remote`, the store lies there, and `path` is a folder of its mirror.

        Raises:
            StoreError: no store is there, or one of a format that this version does not read.
            StaleStoreError: the recipe differs; the message names the first field that does, and both values.
            CorruptStoreError: `recipe.json` is no recipe.
        """
        if remote is not None:
            remote.open(path)
        store = cls(path, read_recipe(path), remote)
        if expected is not None:
            store.check_recipe(expected)
        return store

    def check_recipe(self, expected: Recipe) -> None:
        """Check that the states are of the recipe `expected`.

        Raises:
            StaleStoreError: they are not; the message names the first field that differs, and both values.
        """
        if (difference := self.recipe.first_difference(expected)) is not None:
            field, stored, wanted = difference
            raise StaleStoreError(
                f"{self.where} was encoded with {field} = {stored!r}, expected {wanted!r}",
                "set it back, or encode anew (recycle encode --replace)",
            )

    @property
    def where(self) -> str:
        """What messages call the store: its folder, or where else it lies."""
        return str(self.path) if self.remote is None else self.remote.where(self.path)

    @property
    def is_linked(self) -> bool:
        """Whether its files on this disk have other names too, as DVC's links to its cache do."""
        recipe = self.path / RECIPE_FILE
        return recipe.is_symlink() or recipe.stat().st_nlink > 1

    def segments(self) -> list[str]:
        """Return the ids of all committed segments, sorted."""
        if self.remote is not None and not self._is_mirrored:
            self.remote.refresh(self.path)
            self._is_mirrored = True
        return committed_segments(self.path)

    def keys(self) -> np.ndarray:
        """Return the keys (N, 16) uint8 of all committed samples, segment by segment."""
        return self._open_index().keys()

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which of `keys` (n, 16) uint8 are not stored."""
        return self._open_index().missing(keys)

    def holds(self, unit_keys: np.ndarray) -> bool:
        """Say whether just the samples `unit_keys` (n, 16) uint8, in this order, are a committed segment."""
        segment = self.path / segment_id(unit_keys)
        return is_committed(segment) or (self.remote is not None and self.remote.adopt(segment))

    def rows(self, keys: np.ndarray) -> Rows:
        """Return where the samples `keys` (n, 16) uint8 lie, in their order.

        Raises:
            MissingKeysError: some were never encoded; the message names up to five.
        """
        return self._open_index().rows(keys)

    def set_aside(self) -> np.ndarray:
        """Return the keys (m, 16) uint8 of the samples that were found bad in a unit that is committed."""
        # Of the segments that `missing` knows: a unit that is committed meanwhile must count in both or in neither.
        known = self._open_index().segments
        keys = [key for segment in known for key in read_segment_spec(self.path / segment).set_aside]
        return np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, KEY_BYTES)

    def nbytes(self) -> int:
        """Return the size of all committed segments in bytes, as files."""
        return sum(segment_nbytes(self.path / segment) for segment in self.segments())

    def refresh(self) -> None:
        """Look again for segments; places that `rows` gave before stay valid."""
        self._index, self._is_mirrored = None, False

    def write_segment(
        self, unit_keys: np.ndarray, tensors: Mapping[str, Values], set_aside: np.ndarray | None = None
    ) -> SegmentInfo:
        """Commit one unit: its keys (n, 16) uint8 and its tensors by name (`state.NAME`, `input.NAME`, ...).

        A tensor is one array (n, ...), or a sequence of n arrays whose shapes may differ in one axis. `shape.NAME`
        (n, axes) stands for a floating-point input of which the suffix needs the shape alone; `extra.NAME` is what the
        task, and not the suffix, needs to know of a sample's inputs. Floating-point values
        are stored in the recipe's dtype, or in a wider one where this unit's values need its range; int64 is
        stored as int32 where it fits. A unit that is there already is left alone, whatever its tensors. `set_aside`
        (m, 16) uint8 are the keys of bad samples of the unit, which a later plan must not count as waiting.

        Raises:
            StoreError: keys, names, shapes or dtypes cannot be stored, or the disk refuses; nothing is committed then.
        """
        info = write_segment(self.path, unit_keys, tensors, self.recipe, set_aside, self.remote)
        self._index = None
        return info

    def apply(self, changes: Sequence[Change], progress: Progress = iter) -> list[str]:
        """Carry out what `pipeline.store.upkeep` planned under this `alone`, and remove what dead writers left.

        Returns the faults, one line each, of segments that could not be changed because their bytes are not those that
        were written; they are left as they are.

        Raises:
            StoreError: the disk refuses; what was not changed yet is as it was. Or the store lies elsewhere.
        """
        if self.remote is not None:
            raise StoreError(
                f"{self.where}: segments of a store that lies elsewhere are not removed or merged; "
                "do it on a copy on disk, and put that there"
            )
        faults = apply(self.path, self.recipe, changes, progress)
        sweep(self.path)
        self.refresh()
        return faults

    def _open_index(self) -> KeyIndex:
        index = self._index  # a thread that writes may forget it meanwhile
        if index is None:
            index = self._index = KeyIndex(self.path, self.segments())
        return index


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing to the store at `path`, and from changing it in any other way, meanwhile.

    Raises:
        StoreError: somebody writes to it, or changes it.
    """
    with claim(path) as is_alone:
        if not is_alone:
            raise StoreError(f"{path}: somebody is writing to this store; wait for its end and run again")
        yield


def remove(path: Path) -> None:
    """Remove the store at `path`; further stores in its folder stay. After a kill what is left of it is a store."""
    own = own_entries(path)
    if len(own) == len(list(path.iterdir())):
        discard(path)
        return
    for entry in sorted(own, key=lambda entry: entry.name == RECIPE_FILE):
        if entry.is_dir() and not entry.is_symlink():
            discard(entry)
        else:
            entry.unlink()


def own_entries(path: Path) -> list[Path]:
    """Return what lies in the folder `path` and neither is nor holds a store: all that is of a store there."""
    return [entry for entry in sorted(path.iterdir()) if not find_stores(entry)]


def _write_recipe(path: Path, recipe: Recipe) -> None:
    others = [entry.name for entry in own_entries(path) if not entry.name.startswith(".")]
    if others:
        raise StoreError(f"{path} holds {others[0]!r} and no {RECIPE_FILE}; choose an empty folder for the store")
    with scratch(path) as temporary:
        draft = temporary / RECIPE_FILE
        draft.write_text(recipe.to_json(), encoding="utf-8")
        publish_file(draft, path / RECIPE_FILE)
