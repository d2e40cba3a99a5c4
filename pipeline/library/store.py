"""A store in a training loop: states with the other fields of their items, one by one, in batches, or by a loader.

B batch, and any further axes as the tensor has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import ConfigError, MissingKeysError, first_few
from pipeline.library.fields import batch_of
from pipeline.library.recipe import check_network
from pipeline.library.table import ItemTable, find_split, table_path
from pipeline.split import Prefix
from pipeline.split.inputs import ExampleInputs
from pipeline.store import (
    CODECS,
    EXTRA_PREFIX,
    INPUT_PREFIX,
    SHAPE_PREFIX,
    STATE_PREFIX,
    Reader,
    Rows,
    SegmentCache,
    Store,
)
from pipeline.train import order, processes
from pipeline.train.config import Residency
from pipeline.train.loader import Loader, StoredRows, choose_source

UNPACKED = ".unpacked"
UNPACKED_BYTES = 20_000_000_000
"""Disk that unpacked segments of a compressed store may take beside it."""


class StateStore:
    """The states of the items of one data set, with their other fields.

    Attributes:
        path: the folder of the store.
        table: the items, in the order of the data set, without those left out.
        places: where their states are, in the same order.
    """

    def __init__(
        self, path: Path, table: ItemTable, places: Rows, reader: Callable[[], Reader], inputs: ExampleInputs
    ) -> None:
        """Use `encode`, `open_store` or `open_project`."""
        self.path, self.table, self.places = path, table, places
        self._open_reader, self._inputs = reader, inputs
        self._pad = {
            name if name.startswith(EXTRA_PREFIX) else f"{INPUT_PREFIX}{name}": value
            for name, value in table.fills.items()
        }

    @classmethod
    def open(cls, store: Store, split: str, inputs: ExampleInputs) -> "StateStore":
        """Open a split of a store that is known to be of the right recipe, for a network that takes `inputs`.

        Raises:
            MissingKeysError: a state of its items was removed; the message names up to five.
        """
        table = ItemTable.read(table_path(store.path, split), store.recipe.digest)
        return cls(store.path, table, store.rows(table.keys), partial(open_reader, store), inputs)

    def __len__(self) -> int:
        return len(self.table.keys)

    @property
    def keys(self) -> list[str]:
        """The keys of the items, in hex."""
        return [key.tobytes().hex() for key in self.table.keys]

    @property
    def bad(self) -> Mapping[int, str]:
        """Why items of the data set are not here, by their numbers."""
        return self.table.bad

    def dataset(self, indices: Sequence[int] | None = None) -> "StateDataset":
        """Return the items, or those at `indices`, as a data set for a DataLoader, with `collate` as its collate_fn."""
        return StateDataset(self, np.arange(len(self)) if indices is None else np.asarray(indices, np.int64))

    def collate(self, items: "Sequence[Mapping[str, Any]] | ItemBatch") -> dict[str, Any]:
        """Return items as one batch, {"state": {name: (B, ...)}, other fields}, padded on the right."""
        if isinstance(items, ItemBatch):
            return items.dataset.store.batch(items.rows)  # one collate_fn may serve several splits
        fills = self.table.fills
        states = {name: batch_of([item["state"][name] for item in items], 0) for name in items[0]["state"]}
        inputs = self._inputs.read
        others = {
            name: batch_of([item[name] for item in items], fills.get(name, 0 if name in inputs else None))
            for name in items[0]
            if name != "state"
        }
        return {"state": states, **others}

    def of_keys(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the items with these keys, in hex, as one batch; raises MissingKeysError where one is not here."""
        known = {key: row for row, key in enumerate(self.keys)}
        if absent := [key for key in keys if key not in known]:
            raise MissingKeysError(f"{len(absent)} of {len(keys)} keys are not here: {first_few(absent)}; see `keys`")
        return self.batch(np.array([known[key] for key in keys], np.int64))

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the items at `rows` (B,) int64 as one batch, in their order."""
        places = self.places[rows]
        by_place = np.argsort(places.codes, kind="stable")
        tensors = self._reader.gather(places[by_place], self._pad, into=by_place, without=self._known)
        return self.as_batch(tensors, rows)

    def as_batch(self, tensors: Mapping[str, Tensor], rows: np.ndarray) -> dict[str, Any]:
        """Return what the segments hold of the items at `rows` (B,) int64 with their other fields."""
        batch: dict[str, Any] = {"state": _with_prefix(tensors, STATE_PREFIX), **_with_prefix(tensors, INPUT_PREFIX)}
        batch |= _with_prefix(tensors, EXTRA_PREFIX)
        for name, shapes in _with_prefix(tensors, SHAPE_PREFIX).items():
            shape = tuple(shapes.amax(0).tolist())
            if self.is_needed(name, shape):
                batch[name] = torch.zeros(()).expand(len(rows), *shape)
        fills = self.table.fills
        return batch | {name: one.take(rows, fills.get(name)) for name, one in self.table.columns.items()}

    def is_needed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether the suffix has to be given an input without values, as its shape is not the example's."""
        spec = self._inputs.specs.get(name)
        return spec is None or spec.shape != shape

    def loader(
        self,
        batch_size: int = 64,
        shuffle: bool = False,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        residency: Residency = "auto",
    ) -> "StateLoader":
        """Return the batches of all items, or of those at `indices`, as `collate` makes them: the fastest way.

        Every iteration is the next epoch, in an order that `seed` decides. Within a batch, items are in the order in
        which they are stored. Batches are on `device`, to which an accelerator copies all states at once where they
        fit ("auto"; "device" and "host" decide it). Of several processes, each gets its share of every batch.
        """
        rows = self.dataset(indices).rows

        def batches(epoch: int) -> list[np.ndarray]:
            return order.batches(rows, batch_size, seed=seed, epoch=epoch, shuffle=shuffle)

        source = choose_source(self.places, self._reader, torch.device(device), residency)
        loader = Loader(
            StoredRows(self.places, source),
            {},
            batches,
            pad=self.table.fills,
            device=device,
            share=(processes.rank(), processes.world()),
        )
        return StateLoader(self, loader)

    @cached_property
    def _known(self) -> frozenset[str]:
        """The tensors that need not be read: shapes that the suffix knows."""
        shapes = self.table.shapes.items()
        return frozenset(f"{SHAPE_PREFIX}{name}" for name, shape in shapes if not self.is_needed(name, shape))

    @cached_property
    def _reader(self) -> Reader:
        return self._open_reader()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: it maps the segments anew."""
        return {name: value for name, value in vars(self).items() if name != "_reader"}


class StateDataset(Dataset[dict[str, Any]]):
    """Items as {"state": {name: tensor}, other fields}: one state without padding for each item.

    Attributes:
        rows: the rows of the items in the store, (n,) int64.
    """

    def __init__(self, store: StateStore, rows: np.ndarray) -> None:
        """Use `StateStore.dataset`."""
        if len(rows) and not (-len(store) <= rows.min() and rows.max() < len(store)):
            raise ConfigError(f"indices go from {rows.min()} to {rows.max()}; the store has {len(store)} items")
        self.store, self.rows = store, rows % max(1, len(store))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[[index]]
        tensors = self.store._reader.gather(self.store.places[row])
        item: dict[str, Any] = {"state": {name: one[0] for name, one in _with_prefix(tensors, STATE_PREFIX).items()}}
        for prefix in (INPUT_PREFIX, EXTRA_PREFIX):
            item |= {name: one[0] for name, one in _with_prefix(tensors, prefix).items()}
        for name, shapes in _with_prefix(tensors, SHAPE_PREFIX).items():
            if self.store.is_needed(name, shape := tuple(shapes[0].tolist())):
                item[name] = torch.zeros(()).expand(shape)
        return item | {name: column[int(row[0])] for name, column in self.store.table.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> "ItemBatch":
        """Return several items, which `StateStore.collate` reads at once."""
        return ItemBatch(self, np.asarray(indices, np.int64))


class ItemBatch(Sequence[dict[str, Any]]):
    """Some items of a data set, each read when it is asked for."""

    def __init__(self, dataset: StateDataset, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices

    @property
    def rows(self) -> np.ndarray:
        """Rows of the items in the store, (B,) int64."""
        rows: np.ndarray = self.dataset.rows[self.indices]
        return rows

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return ItemBatch(self.dataset, self.indices[place])
        return self.dataset[int(self.indices[place])]


class StateLoader:
    """The batches of one epoch after another."""

    def __init__(self, store: StateStore, loader: Loader) -> None:
        """Use `StateStore.loader`."""
        self._store, self._loader = store, loader
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        self._loader.set_epoch(self.epoch)
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._loader.set_epoch(self.epoch)
        self.epoch += 1
        for batch in self._loader:
            rows = batch.rows.numpy()
            columns, fills = self._store.table.columns, self._store.table.fills
            fields = {name: column.take(rows, fills.get(name)) for name, column in columns.items()}
            inputs = {
                name: item
                for name, item in batch.inputs.items()
                if not item.is_floating_point() or self._store.is_needed(name, tuple(item.shape[1:]))
            }
            yield {
                "state": batch.state,
                **inputs,
                **batch.targets,
                **{name: self._moved(value) for name, value in fields.items()},
            }

    def _moved(self, value: Any) -> Any:
        return value.to(self._loader.device, non_blocking=True) if isinstance(value, Tensor) else value


def open_store(
    path: Path | str, prefix: Prefix, split: str | None = None, collate_fn: Callable[[list[Any]], Any] | None = None
) -> StateStore:
    """Open a store that `encode` made, once it is proved that its states are those of `prefix`.

    Args:
        path: its folder.
        prefix: from `split`, as for `encode`.
        split: name of the data set in the store; needed where there are several.
        collate_fn: what `encode` was given, to be compared too; None leaves it uncompared.

    Raises:
        StaleStoreError: the store is of another network, cut or `collate_fn`; the message names the first difference.
        StoreError: no store is there, or no such split.
    """
    store = Store.open(Path(path))
    check_network(store, prefix, collate_fn)
    return StateStore.open(store, find_split(store.path, split), prefix.inputs)


def open_reader(store: Store) -> Reader:
    """Return a reader of `store`; compressed segments are unpacked to a folder in it."""
    codec = CODECS[store.recipe.storage.partition(":")[0]]
    cache = None if codec.is_mappable else SegmentCache(store.path / UNPACKED, UNPACKED_BYTES)
    return Reader(store.path, cache=cache)


def _with_prefix(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): item for name, item in named.items() if name.startswith(prefix)}
