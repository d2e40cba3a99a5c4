"""Encode: any data set -> windows of items -> keys; what the store lacks -> prefix -> states; a table of the items."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.encode.config import EncodeConfig
from pipeline.encode.encoder import Encoder, compute_format
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample, attempt, summary
from pipeline.encode.unit import Unit
from pipeline.errors import BadSampleError, DataError
from pipeline.keys import JSON, KEY_BYTES
from pipeline.library.fields import Column, join_columns
from pipeline.library.items import Collate, ItemReader, Key, Window, padding, windows
from pipeline.library.recipe import check, recipe_for
from pipeline.library.store import StateStore
from pipeline.library.table import ItemTable, table_path
from pipeline.models import Preprocess
from pipeline.split import Prefix
from pipeline.store import KeySet, Store, first_rows

log = logging.getLogger("recycle")


class AsGiven(Preprocess):
    """Hands on what `collate_fn` returned."""

    def __init__(self) -> None:
        self.fills: dict[str, float] = {}

    @property
    def pad(self) -> dict[str, float]:
        return self.fills

    def __call__(self, content: object) -> dict[str, Tensor]:
        if not isinstance(content, dict):
            raise BadSampleError(f"content is {type(content).__name__}; expected tensors by name")
        return content

    def recipe(self) -> Mapping[str, JSON]:
        return {}

    def advice(self) -> str:
        """Return what decides the inputs."""
        return "compare what collate_fn returns for this item with the example of the split"


def encode(
    dataset: Iterable[Any],
    prefix: Prefix,
    path: Path | str,
    collate_fn: Collate | None = None,
    batch_size: int = 64,
    workers: int = 0,
    codec: str = "raw",
    dtype: str = "float16",
    key: Key | None = None,
    split: str = "train",
) -> StateStore:
    """Encode every item of `dataset` whose content the store at `path` lacks, and return the store.

    An item may be a tensor, a tuple, or a mapping. What the prefix reads of it, by the names of the model's arguments,
    is its content; its other fields (labels, ids) are kept beside and come back with its state. Equal contents are
    encoded once. What is committed is not encoded again: a run that was killed, or that gets more items, continues.
    Several processes may encode into one folder.

    An item that cannot be read, or whose state is not finite, is left out and reported: in the log, and in `bad` of
    the store by its number. All others are kept.

    Args:
        dataset: a torch or Hugging Face data set or a list, which is indexed; or any other iterable, read once, in this
            process, and ended by an item that fails.
        collate_fn: makes what the model is called with of a list of items; called with one at a time, and once with
            two, to see what it pads with. None takes items as they are.
        batch_size: items per forward pass.
        workers: processes that read a data set that is indexed.
        codec: "raw", "zstd", "int8", "int8-channel", "int8-group" or "int4-group", as `encode.codec` of a project.
        dtype: "float16", "bfloat16" or "float32": stored type of floating-point values.
        key: a function of an item whose result (text, number, bytes, array) decides which items are the same, in place
            of the content.
        split: name of this data set in the store, such as "train" or "validation"; it replaces the one of this name.

    Raises:
        StaleStoreError: the store was encoded with another network, cut, collate_fn, codec or dtype.
        DataError: no item can be encoded, an iterable fails, or a field cannot be stored.
    """
    config = EncodeConfig.model_validate(
        {"cuts": [0], "batch_size": batch_size, "workers": 0, "codec": codec, "dtype": dtype}
    )
    where = table_path(Path(path), split)
    recipe = recipe_for(prefix, f"{codec}:{dtype}", collate_fn, key)
    if (Path(path) / "recipe.json").exists():
        check(Store.open(Path(path)), recipe)
    store = Store.create(Path(path), recipe)
    reader = ItemReader(prefix.inputs, collate_fn, key)
    run = _Run(prefix, store, config, dataset, reader)
    total = len(dataset) if isinstance(dataset, Sized) else None
    with (
        _without_autocast(run.device),
        tqdm(desc="encode", unit="item", total=total, disable=None) as progress,
    ):
        for window in windows(dataset, reader, config.segment_samples, workers):
            run.add(window)
            progress.update(len(window) + len(window.bad))
    run.write(where)
    return StateStore.open(Store.open(Path(path)), split, prefix.inputs)


@dataclass
class _Run:
    """One encode: what is found out window by window."""

    prefix: Prefix
    store: Store
    config: EncodeConfig
    dataset: Any
    reader: ItemReader
    preprocess: AsGiven = field(default_factory=AsGiven)
    keys: list[np.ndarray] = field(default_factory=list)
    index: list[np.ndarray] = field(default_factory=list)
    fields: list[dict[str, Column]] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    bad_keys: dict[bytes, BadSample] = field(default_factory=dict)
    fills: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, set[tuple[int, ...] | None]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)
    encoded: int = 0

    def __post_init__(self) -> None:
        self.before = Store.open(self.store.path)  # its index is read once, and not again after each segment
        self.again = KeySet(self.before.set_aside())
        self.encoder: Encoder | None = None

    @property
    def device(self) -> torch.device:
        """The device that the prefix computes on."""
        return compute_format([self.prefix], self.config).device

    def add(self, window: Window) -> None:
        """Encode what the store lacks of a window, and keep its fields."""
        self.bad += window.bad
        if not len(window):
            if not self.keys and self.bad:
                raise DataError(f"none of the first {len(self.bad)} items can be encoded: {summary(self.bad)}")
            return
        if not self.fills:
            self._find_padding(window)
        for name, column in window.inputs.items():
            self.shapes.setdefault(name, set()).add(column.shape)
        units = self._lacking(window)
        if units:
            self._encode(window, units)
        failed = [self.bad_keys.get(key.tobytes()) for key in window.keys]
        rows = np.array([row for row, fault in enumerate(failed) if fault is None], np.int64)
        self.bad += [
            BadSample(number, f"item {number}", fault.reason, fault.traceback)
            for number, fault in zip(window.index.tolist(), failed, strict=True)
            if fault is not None
        ]
        self.keys.append(window.keys[rows])
        self.index.append(window.index[rows])
        if len(rows):
            self.fields.append({name: column.of_rows(rows) for name, column in window.fields.items()})

    def write(self, where: Path) -> None:
        """Write the table of the items, and log what was done."""
        keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *self.keys])
        index = np.concatenate([np.empty(0, np.int64), *self.index])
        if self.bad:
            log.warning("%d of %d items left out: %s", len(self.bad), len(self.bad) + len(index), summary(self.bad))
        if not len(index):
            raise DataError(f"no item can be encoded: {summary(self.bad) if self.bad else 'the data set is empty'}")
        log.info("%d items encoded, %d were there", self.encoded, len(KeySet(keys)) - self.encoded)
        bad = {sample.row: sample.reason for sample in sorted(self.bad, key=lambda sample: sample.row)}
        shapes = {name: shape for name, (shape, *others) in self.shapes.items() if shape is not None and not others}
        table = ItemTable(keys, index, join_columns(self.fields), bad, self.fills, shapes)
        table.write(where, self.store.recipe.digest)

    def _find_padding(self, window: Window) -> None:
        """Look at how `collate_fn` pads the shortest and the longest of some items of unequal lengths."""
        if self.reader.collate_fn is None or not hasattr(self.dataset, "__getitem__"):
            return
        columns = (*window.inputs.values(), *window.fields.values())
        ragged = next((column for column in columns if column.shapes is not None), None)
        if ragged is None:
            return
        sizes = [value.numel() for value in ragged]
        pair = [int(window.index[sizes.index(size)]) for size in (min(sizes), max(sizes))]
        look = partial(padding, self.reader.collate_fn, self.reader)
        self.fills = attempt(lambda: look([self.dataset[number] for number in pair]), lambda _: {})
        self.preprocess.fills = {name: value for name, value in self.fills.items() if name in self.reader.names}

    def _lacking(self, window: Window) -> list[Unit]:
        """Return the units of a window: new contents, and those set aside before, whose reason may be gone."""
        rows = first_rows(window.keys)
        new = np.array([key.tobytes() not in self.seen for key in window.keys[rows]], bool)
        self.seen |= {key.tobytes() for key in window.keys[rows]}
        rows = rows[new & self.before.missing(window.keys[rows])]
        again = self.again.contains(window.keys[rows])
        units = [Unit(some, window.keys[some], ((0, 0),)) for some in (rows[~again], rows[again]) if len(some)]
        return [unit for unit in units if not self.store.holds(unit.keys)]

    def _encode(self, window: Window, units: list[Unit]) -> None:
        keyed = KeyedSamples(window.keys, sum_of_sizes(window), [])
        if self.encoder is None:
            views, stores = [self.preprocess], [[self.store]]
            self.encoder = Encoder(window, views, [self.prefix], stores, self.config, keyed.trimming_rows)
        self.encoder.source, self.encoder.trimming_rows = window, keyed.trimming_rows
        for outcome in self.encoder.run(units):
            self.encoded += len(outcome.part.rows) - len(outcome.bad)
            self.bad_keys |= {window.keys[sample.row].tobytes(): sample for sample in outcome.bad}


def sum_of_sizes(window: Window) -> np.ndarray:
    """Return the number of values of the inputs of each item, (n,) int64."""
    sizes = np.zeros(len(window), np.int64)
    for column in window.inputs.values():
        sizes += [value.numel() for value in column]
    return sizes


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Turn off the caller's autocast: the recipe says that the type of the weights computes."""
    with torch.autocast(device.type, enabled=False):
        yield
