"""Items of any data set -> what the prefix reads of them, their keys, and their other fields; bad ones set aside."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data import Row, Source
from pipeline.encode.quarantine import BadSample, attempt, set_aside
from pipeline.errors import BadSampleError, DataError
from pipeline.keys import KEY_BYTES, Content, content_key
from pipeline.library.fields import Column, columns_of
from pipeline.split.inputs import ExampleInputs

Collate: TypeAlias = Callable[[list[Any]], Any]
Key: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Item:
    """One item of a data set: its key, 16 bytes, the inputs that the prefix reads, and its other fields."""

    key: bytes
    inputs: Mapping[str, Tensor]
    fields: Mapping[str, Any]


class ItemReader:
    """Takes an item of a data set apart; the same in every process."""

    def __init__(self, inputs: ExampleInputs, collate_fn: Collate | None, key: Key | None) -> None:
        self.collate_fn, self.key, self.positional = collate_fn, key, inputs.positional
        self.names = [name for name in inputs.specs if name in inputs.read]

    def __call__(self, raw: Any) -> Item:
        """Return the item; raises BadSampleError where it lacks an input of the prefix."""
        named = self.named(raw)
        if absent := [name for name in self.names if not isinstance(named.get(name), Tensor)]:
            raise BadSampleError(
                f"has no tensor {absent[0]!r}, which the prefix reads; its fields are {', '.join(named) or 'none'}: "
                "give a collate_fn that returns what the model is called with"
            )
        if "state" in named:
            raise BadSampleError("has a field 'state', which is the name of the state; rename it in collate_fn")
        inputs = {name: named.pop(name) for name in self.names}
        content = ["key", self.key(raw)] if self.key else {name: tensor_content(item) for name, item in inputs.items()}
        return Item(content_key(content), inputs, named)

    def named(self, raw: Any) -> dict[str, Any]:
        """Return the fields of an item by name; those of a tuple are named as the example's arguments, or numbered."""
        if self.collate_fn is None:
            return {name: _value(value) for name, value in self._as_mapping(raw).items()}
        batch = self._as_mapping(self.collate_fn([raw]))
        return {name: _value(_first(value)) for name, value in batch.items()}

    def _as_mapping(self, raw: Any) -> dict[str, Any]:
        if isinstance(raw, Mapping):
            return {str(name): value for name, value in raw.items()}
        if isinstance(raw, tuple) and hasattr(raw, "_asdict"):
            return dict(raw._asdict())
        values = raw if isinstance(raw, tuple | list) else (raw,)
        names = itertools.chain(self.positional, map(str, itertools.count(len(self.positional))))
        return dict(zip(names, values, strict=False))


@dataclass(frozen=True)
class Window(Source):
    """Items that follow each other in a data set, without the bad ones: a source that the encoder reads."""

    keys: np.ndarray
    """(n, 16) uint8."""
    index: np.ndarray
    """Numbers of the items in the data set, (n,) int64."""
    inputs: Mapping[str, Column]
    fields: Mapping[str, Column]
    bad: Sequence[BadSample]
    """Their rows are numbers in the data set."""

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, i: int) -> Row:
        return Row(f"item {self.index[i]}", None, {})

    def content(self, i: int) -> Any:
        return {name: column[i] for name, column in self.inputs.items()}

    def key(self, i: int, content: object) -> bytes:
        key: bytes = self.keys[i].tobytes()
        return key


class Attempts(Dataset[Any]):
    """The items of a data set that is indexed, each read or set aside."""

    def __init__(self, dataset: Any, read: ItemReader) -> None:
        self.dataset, self.read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Item | BadSample]:
        item = attempt(lambda: self.read(self.dataset[index]), partial(set_aside, _Named(), index))
        return index, item


def windows(dataset: Any, read: ItemReader, size: int, workers: int) -> Iterator[Window]:
    """Yield the items of a data set in windows of `size`, each item read once.

    A data set that is indexed is read by `workers` processes; any other iterable in this one.

    Raises:
        DataError: `dataset` is a DataLoader, or an iterable that fails, with the number of the item.
    """
    if isinstance(dataset, DataLoader):
        raise DataError("dataset is a DataLoader, whose items are batches; give its dataset, and its collate_fn")
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        workers = min(workers, -(-len(dataset) // size))
        yield from DataLoader(
            Attempts(dataset, read),
            batch_size=size,
            num_workers=workers,
            collate_fn=make_window,
        )
        return
    numbered = _numbered(dataset, read)
    while some := list(itertools.islice(numbered, size)):
        yield make_window(some)


def make_window(numbered: Sequence[tuple[int, Item | BadSample]]) -> Window:
    """Return items with their numbers as a window; those with other fields than the first one are bad."""
    good, bad = list[tuple[int, Item]](), list[BadSample]()
    for number, item in numbered:
        if isinstance(item, BadSample):
            bad.append(item)
        elif good and item.fields.keys() != good[0][1].fields.keys():
            fields, first = (", ".join(one.fields) or "none" for one in (item, good[0][1]))
            bad.append(BadSample(number, f"item {number}", f"its other fields are {fields}; those before have {first}"))
        else:
            good.append((number, item))
    items = [item for _, item in good]
    keys = np.frombuffer(b"".join(item.key for item in items), np.uint8).reshape(-1, KEY_BYTES)
    inputs, others = columns_of([item.inputs for item in items]), columns_of([item.fields for item in items])
    return Window(keys, np.array([number for number, _ in good], np.int64), inputs, others, bad)


def padding(collate_fn: Collate, read: ItemReader, items: Sequence[Any]) -> dict[str, float]:
    """Return what `collate_fn` pads each tensor with, as it does with these items; nothing where it does not pad."""
    batch, fills = read._as_mapping(collate_fn(list(items))), dict[str, float]()
    for item, number in zip(items, itertools.count()):
        for name, own in read.named(item).items():
            padded = batch.get(name)
            if isinstance(own, Tensor) and own.dim() and isinstance(padded, Tensor) and len(padded[number]) > len(own):
                is_right = torch.equal(padded[number][: len(own)], own)
                fills[name] = float(padded[number][-1 if is_right else 0].reshape(-1)[0])
    return fills


class _Named(Source):
    """Names items by their numbers."""

    def __len__(self) -> int:
        return 0

    def row(self, i: int) -> Row:
        return Row(f"item {i}", None, {})

    def content(self, i: int) -> Any:
        return None


def _numbered(dataset: Any, read: ItemReader) -> Iterator[tuple[int, Item | BadSample]]:
    items = iter(dataset)
    for number in itertools.count():
        try:
            raw = next(items)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"item {number} of an iterable cannot be read ({type(error).__name__}: {error}), nor what follows; "
                "what was encoded before is kept. Mend it, or give an indexed data set, whose other items are kept"
            ) from error
        yield number, attempt(partial(read, raw), partial(set_aside, _Named(), number))


def _first(value: Any) -> Any:
    """Return the value of the only item of a batch."""
    if isinstance(value, Tensor | np.ndarray):
        return value[0] if value.ndim else value
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _value(value: Any) -> Any:
    """Return a field as a tensor on the CPU where it is one, an array or a list of numbers; else as it is."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return value
    return value


def tensor_content(item: Tensor) -> Content:
    """Return a tensor as `content_key` takes it."""
    if item.dtype == torch.bfloat16:
        return ["bfloat16", item.contiguous().view(torch.int16).numpy()]
    return item.contiguous().numpy()
