"""The table of the items of one data set in a store: `<store>/items/<split>.safetensors`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import ConfigError, CorruptStoreError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.library.fields import Column, read_columns, write_columns
from pipeline.store import Store

FOLDER, SUFFIX = "items", ".safetensors"
NAME = re.compile(r"[A-Za-z0-9_\-]{1,100}")
KEY, INDEX = "/key", "/index"
"""Columns beside the fields, whose names are those of arguments and columns of a data set."""


@dataclass(frozen=True)
class ItemTable:
    """N items in the order of their data set.

    Attributes:
        keys: (N, 16) uint8.
        index: numbers of the items in the data set, (N,) int64.
        columns: their fields by name.
        bad: why the other items of the data set are not here, by their numbers.
        shapes: the shape of each input that has one shape in all items.
        fills: what a field or an input is padded with, by name, where a `collate_fn` showed it.
    """

    keys: np.ndarray
    index: np.ndarray
    columns: Mapping[str, Column]
    bad: Mapping[int, str] = field(default_factory=dict)
    fills: Mapping[str, float] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def write(self, path: Path, recipe: str) -> None:
        """Write the table, of a store whose recipe has this digest; raises DataError where a field cannot be stored."""
        own = {KEY: Column(torch.from_numpy(self.keys)), INDEX: Column(torch.from_numpy(self.index))}
        bad = {str(number): reason for number, reason in self.bad.items()}
        about = {"recipe": recipe, "bad": bad, "fills": dict(self.fills), "shapes": dict(self.shapes)}
        write_columns(path, {**self.columns, **own}, about)

    @classmethod
    def read(cls, path: Path, recipe: str) -> "ItemTable":
        """Read what `write` wrote; raises CorruptStoreError where it is something else, or of another recipe."""
        columns, about = read_columns(path)
        try:
            keys, index = (columns.pop(name).values.numpy() for name in (KEY, INDEX))  # type: ignore[union-attr]
            bad = {int(number): str(reason) for number, reason in about["bad"].items()}
            fills = {name: float(value) for name, value in about["fills"].items()}
            table = cls(
                keys, index, columns, bad, fills, {name: tuple(map(int, one)) for name, one in about["shapes"].items()}
            )
            sizes = {len(keys), len(index), *map(len, columns.values())}
            if about["recipe"] != recipe or len(sizes) > 1 or keys.shape[1:] != (KEY_BYTES,) or keys.dtype != np.uint8:
                raise ValueError("another recipe" if about["recipe"] != recipe else f"columns of the lengths {sizes}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CorruptStoreError(f"{path} is no table of items of this store ({error}); encode again") from error
        return table


def table_path(store: Path, split: str) -> Path:
    """Return the path of the table of a split; raises ConfigError where its name cannot be that of a file."""
    if not NAME.fullmatch(split):
        raise ConfigError(f"split is {split!r}; give a name of letters, digits, '_' and '-', as in 'validation'")
    return store / FOLDER / f"{split}{SUFFIX}"


def splits_of(store: Path) -> list[str]:
    """Return the names of the data sets whose items the store has, sorted."""
    return sorted(path.stem for path in (store / FOLDER).glob(f"*{SUFFIX}") if not path.name.startswith("."))


def faults_of_items(store: Store) -> list[str]:
    """Return the faults of the tables of items in a store, one line each; a project's store has none."""
    faults = []
    for split in [] if store.remote else splits_of(store.path):
        try:
            ItemTable.read(table_path(store.path, split), store.recipe.digest)
        except CorruptStoreError as error:
            faults.append(str(error))
    return faults


def find_split(store: Path, split: str | None) -> str:
    """Return `split` if the store has it, or the only one that it has; raises StoreError, which names those there."""
    known = splits_of(store)
    if split in known or (split is None and len(known) == 1):
        return split or known[0]
    if not known:
        raise StoreError(f"{store} has no items; encode a data set into it")
    raise StoreError(f"split is {split!r}; {store} has {', '.join(known)}; name one of these")
