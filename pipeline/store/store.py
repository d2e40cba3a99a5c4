"""A folder of immutable segments that share one recipe."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import StaleStoreError, StoreError
from pipeline.keys import KEY_BYTES, Recipe
from pipeline.store.format.codecs import parse_storage
from pipeline.store.format.layout import check_tensor_name, committed_segments, segment_id
from pipeline.store.format.metadata import SegmentSpec, read_recipe, read_segment_spec
from pipeline.store.format.names import FORMAT, RECIPE_FILE
from pipeline.store.format.segment_files import folder_nbytes
from pipeline.store.local.files import DISK, StoreFiles, own_entries
from pipeline.store.local.index import KeyIndex, Rows, check_keys
from pipeline.store.local.temporary import discard, exclusive_lock, shared_lock, sweep
from pipeline.store.local.writer import SegmentInfo, commit
from pipeline.store.remote.mirror import Remote

if TYPE_CHECKING:
    from pipeline.store.format.values import Values


class Store:
    """The states of one recipe. Any number of processes may write to it and read from it at the same time.

    Segments that other processes commit are seen after `refresh`. Segments are removed or merged under
    `exclusive_access` only, which no other process gets while a store returned by `create` exists.

    Attributes:
        path: the store's folder, or its mirror's.
        remote: the bucket of the store, if it is in one.
        files: the files of the store, on this disk or in the bucket.
    """

    def __init__(self, path: Path, recipe: Recipe, remote: Remote | None = None) -> None:
        """Use `Store.create` or `Store.open`, which prove that `path` holds states of `recipe`."""
        self.path = path
        self.recipe = recipe
        self.remote = remote
        self.files: StoreFiles = remote or DISK
        self._is_fresh = False
        self._index: KeyIndex | None = None

    @classmethod
    def create(cls, path: Path, recipe: Recipe, remote: Remote | None = None) -> "Store":
        """Open the store at `path` for writing, and make it if nothing is there; leftovers of killed writers go.

        With `remote`, the store is in a bucket, and `path` in its mirror.

        Raises:
            StaleStoreError: a store of another recipe is there.
            StoreError: the folder holds something else, or cannot be written, or its segments are being removed.
        """
        parse_storage(recipe.storage)
        if recipe.format != FORMAT:
            raise StoreError(f"recipe.format is {recipe.format}; this version writes format {FORMAT}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            sweep(path)
            (remote or DISK).create(path, recipe.to_json())
        except OSError as error:
            raise StoreError(f"{path}: no store can be made here ({error.strerror}); choose another folder") from error
        store = cls.open(path, recipe, remote)
        weakref.finalize(store, shared_lock(path).close)
        return store

    @classmethod
    def open(cls, path: Path, expected: Recipe | None = None, remote: Remote | None = None) -> "Store":
        """Open the store at `path`, of the recipe `expected` if one is given.

        With `remote`, the store is in a bucket, and `path` in its mirror.

        Raises:
            StoreError: no store is there, or one of a format that this version does not read.
            StaleStoreError: the recipe differs; the message names the first field that does, and both values.
            CorruptStoreError: `recipe.json` is no recipe.
        """
        (remote or DISK).open(path)
        store = cls(path, read_recipe(path), remote)
        if expected is not None:
            store.check_recipe(expected)
        return store

    def check_recipe(self, expected: Recipe) -> None:
        """Raise StaleStoreError unless the states are of the recipe `expected`; it names the first difference."""
        if (difference := self.recipe.first_difference(expected)) is not None:
            field, stored, wanted = difference
            raise StaleStoreError(
                f"{self.where} was encoded with {field} = {stored!r}, expected {wanted!r}",
                "set it back, or encode anew (recycle encode --replace)",
            )

    @property
    def where(self) -> str:
        """The store's name in messages: its folder, or its URL."""
        return self.files.where(self.path)

    @property
    def is_linked(self) -> bool:
        """Whether its files are links, as DVC makes to its cache."""
        recipe = self.path / RECIPE_FILE
        return recipe.is_symlink() or recipe.stat().st_nlink > 1

    def segments(self) -> list[str]:
        """Return the ids of all committed segments, sorted."""
        if not self._is_fresh:
            self.files.refresh(self.path)
            self._is_fresh = True
        return committed_segments(self.path)

    def keys(self) -> np.ndarray:
        """Return the keys (N, 16) uint8 of all committed samples, segment by segment."""
        return self._open_index().keys()

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which of `keys` (n, 16) uint8 are not stored."""
        return ~self._open_index().contains(keys)

    def holds(self, unit_keys: np.ndarray) -> bool:
        """Return whether exactly the samples `unit_keys` (n, 16) uint8, in this order, are a committed segment."""
        return self.files.holds(self.path / segment_id(unit_keys))

    def rows(self, keys: np.ndarray) -> Rows:
        """Return the places of the samples `keys` (n, 16) uint8, in their order.

        Raises:
            MissingKeysError: some were never encoded; the message names up to five.
        """
        return self._open_index().rows(keys)

    def set_aside(self) -> np.ndarray:
        """Return the keys (m, 16) uint8 of the samples that were found bad in a unit that is committed."""
        # Of the segments that `missing` knows, so that a unit that is committed meanwhile counts in both or in neither.
        known = self._open_index().segments
        keys = [key for segment in known for key in read_segment_spec(self.path / segment).set_aside]
        return np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, KEY_BYTES)

    def nbytes(self) -> int:
        """Return the size of all committed segments in bytes, as files."""
        return sum(folder_nbytes(self.path / segment) for segment in self.segments())

    def refresh(self) -> None:
        """Forget the list of segments; places that `rows` returned before stay valid."""
        self._index, self._is_fresh = None, False

    def write_segment(
        self, unit_keys: np.ndarray, tensors: "Mapping[str, Values]", set_aside: np.ndarray | None = None
    ) -> SegmentInfo:
        """Commit one unit: its keys (n, 16) uint8 and its tensors by name (`state.NAME`, `input.NAME`, ...).

        A tensor is one array (n, ...), or a sequence of n arrays whose shapes may differ in one axis. `shape.NAME`
        (n, axes) is the shape of a floating-point input whose values the suffix does not need; `extra.NAME` is what
        the task, and not the suffix, needs of a sample's inputs. Floating-point values are stored in the recipe's
        dtype, or in a wider one where this unit's values need its range; int64 is stored as int32 where it fits. A unit
        that is there already is left as it is, whatever its tensors. `set_aside` (m, 16) uint8 are the keys of bad
        samples of the unit, which a later plan must not count as waiting.

        Raises:
            StoreError: keys, names, shapes or dtypes cannot be stored, or the disk refuses; nothing is committed then.
        """
        from pipeline.store.format.values import encode  # noqa: PLC0415  (torch is slow to import, and keys need none)

        check_keys(unit_keys)
        if not len(unit_keys):
            raise StoreError("keys are an empty array; give at least one sample")
        for name in tensors:
            check_tensor_name(name)
        bad = [] if set_aside is None else [key.tobytes().hex() for key in set_aside]
        spec = SegmentSpec.new(self.recipe, len(unit_keys), sorted(tensors), bad)
        encoded = (encode(name, tensors[name], len(unit_keys), self.recipe.storage) for name in spec.tensors)
        info = commit(self.path, unit_keys, spec, encoded, self.recipe.storage, self.files)
        self._index = None
        return info

    def _open_index(self) -> KeyIndex:
        index = self._index  # another thread may write, and forget it, meanwhile
        if index is None:
            index = self._index = KeyIndex(self.path, self.segments())
        return index


@contextmanager
def exclusive_access(path: Path) -> Iterator[None]:
    """Keep other processes from writing to the store at `path`, and from changing it in any other way.

    Raises:
        StoreError: another process writes to it, or changes it.
    """
    with exclusive_lock(path) as is_exclusive:
        if not is_exclusive:
            raise StoreError(f"{path}: somebody is writing to this store; wait for its end and run again")
        yield


def remove_store(path: Path) -> None:
    """Remove the store at `path`, and no further store in its folder. A kill leaves a smaller store."""
    own = own_entries(path)
    if len(own) == len(list(path.iterdir())):
        discard(path)
        return
    for entry in sorted(own, key=lambda entry: entry.name == RECIPE_FILE):
        if entry.is_dir() and not entry.is_symlink():
            discard(entry)
        else:
            entry.unlink()
