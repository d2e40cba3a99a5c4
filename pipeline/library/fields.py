"""Columns of what belongs to the items of a data set beside their states: labels, ids, texts, masks.

N items. A column is saved as tensors and JSON: nothing in the file is code.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.encode.ragged import pad_batch
from pipeline.errors import CorruptStoreError, DataError
from pipeline.files import whole
from pipeline.keys import digest, parse_json, tensors_digest
from pipeline.tasks import IGNORED


@dataclass(frozen=True)
class Column:
    """One field of N items.

    Attributes:
        values: (N, ...); of tensors of unequal shapes, all their values one after the other; of anything else, a list.
        shapes: (N, axes) int64 of tensors of unequal shapes; None of others.
        is_number: whether an item is a Python number.
    """

    values: Tensor | list[Any]
    shapes: Tensor | None = None
    is_number: bool = False

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Column":
        """Return the column of `values`: all tensors, all numbers, or all something else.

        Raises:
            DataError: tensors and other values are mixed, or tensors of different numbers of axes.
        """
        if values and all(isinstance(value, bool | int | float) for value in values):
            return cls(_numbers(values), is_number=True)
        if (first := next((value for value in values if isinstance(value, Tensor)), None)) is None:
            return cls(list(values))
        if first.dim() == 1:  # an empty list has no type of its own
            values = [first[:0] if isinstance(value, list | tuple) and not value else value for value in values]
        if not all(isinstance(value, Tensor) for value in values) or len({value.dim() for value in values}) > 1:
            kinds = sorted(
                {f"a tensor of {v.dim()} axes" if isinstance(v, Tensor) else type(v).__name__ for v in values}
            )
            raise DataError(f"holds {' and '.join(kinds)}; give all items the same kind")
        if len({value.shape for value in values}) == 1:
            return cls(torch.stack(_alike(values)))
        return cls(torch.cat([value.reshape(-1) for value in _alike(values)]), _shapes(values))

    @classmethod
    def joined(cls, parts: "Sequence[Column]") -> "Column":
        """Return the column of all items of `parts`; raises as `of`."""
        tensors = [part.values for part in parts if isinstance(part.values, Tensor)]
        if len(tensors) < len(parts) or len({part.axes for part in parts}) > 1:
            return cls.of(list(itertools.chain.from_iterable(parts)))
        if all(part.shapes is None for part in parts) and len({tensor.shape[1:] for tensor in tensors}) == 1:
            return cls(torch.cat(_alike(tensors)), is_number=all(part.is_number for part in parts))
        shapes = [_shapes(list(part)) if part.shapes is None else part.shapes for part in parts]
        return cls(torch.cat([tensor.reshape(-1) for tensor in _alike(tensors)]), torch.cat(shapes))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of every item; None where shapes differ, or items are no tensors."""
        return tuple(self.values.shape[1:]) if isinstance(self.values, Tensor) and self.shapes is None else None

    @property
    def axes(self) -> int | None:
        """Number of axes of an item; None where items are no tensors."""
        if not isinstance(self.values, Tensor):
            return None
        return self.values.dim() - 1 if self.shapes is None else self.shapes.shape[1]

    def __len__(self) -> int:
        return len(self.values) if self.shapes is None else len(self.shapes)

    def __getitem__(self, row: int) -> Any:
        """Return the value of one item; tensors are views."""
        if self.shapes is not None and isinstance(self.values, Tensor):
            shape = self.shapes[row].tolist()
            end = int(self._ends[row])
            return self.values[end - int(np.prod(shape)) : end].view(shape)
        value = self.values[row]
        return value.item() if self.is_number else value

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def of_rows(self, rows: np.ndarray) -> "Column":
        """Return the column of `rows` (n,) int64, in their order."""
        if len(rows) == len(self):
            return self
        if self.shapes is None and isinstance(self.values, Tensor):
            return replace(self, values=self.values[torch.from_numpy(rows)])
        return Column.of([self[row] for row in rows.tolist()])

    def take(self, rows: np.ndarray, fill: float | None = None) -> Any:
        """Return the values of `rows` (B,) as `batch_of` does: a tensor (B, ...), padded on the right, or a list."""
        if self.shapes is None and isinstance(self.values, Tensor):
            taken = self.values.index_select(0, torch.from_numpy(rows))
            return taken.float() if self.is_number and taken.is_floating_point() else taken
        return batch_of([self[row] for row in rows.tolist()], fill)

    @cached_property
    def _ends(self) -> Tensor:
        return torch.zeros(0) if self.shapes is None else self.shapes.prod(1).cumsum(0)


def columns_of(items: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the columns of `items` that have the same fields; raises DataError, which names the field, as `of`."""
    return {name: _named(name, partial(Column.of, [item[name] for item in items])) for name in (items or [{}])[0]}


def join_columns(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """Return the columns of all items of `parts`; raises DataError as `columns_of`."""
    return {name: _named(name, partial(Column.joined, [part[name] for part in parts])) for name in (parts or [{}])[0]}


def _named(name: str, make: Callable[[], Column]) -> Column:
    try:
        return make()
    except DataError as error:
        raise DataError(f"the field {name!r} {error}, or leave it out of what collate_fn returns") from error


def batch_of(values: Sequence[Any], fill: float | None = None) -> Any:
    """Return values of items as one tensor (B, ...), padded on the right where shapes differ; a list if none fits.

    `fill` is the padding: by default 0 of floating-point tensors, and of others what losses ignore.
    """
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.tensor(values)  # float32, as losses take it
    if not all(isinstance(value, Tensor) for value in values) or len({value.dim() for value in values}) > 1:
        return list(values)
    default = 0 if values[0].is_floating_point() or values[0].dtype == torch.bool else IGNORED
    return pad_batch([{"": value} for value in _alike(values)], {"": default if fill is None else fill})[""]


def write_columns(path: Path, columns: Mapping[str, Column], about: Mapping[str, Any]) -> None:
    """Write `columns` and what is `about` them, as JSON, to the file `path`, whole or not at all.

    Raises:
        DataError: a column holds values that are neither tensors nor JSON.
    """
    tensors, kinds = dict[str, Tensor](), dict[str, str]()
    for name, column in columns.items():
        if isinstance(column.values, Tensor):
            kinds[name] = "number" if column.is_number else "tensor" if column.shapes is None else "ragged"
            tensors[f"values.{name}"] = column.values.contiguous()
            if column.shapes is not None:
                tensors[f"shapes.{name}"] = column.shapes
            continue
        try:
            text = json.dumps(column.values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the field {name!r} cannot be stored ({error}); make it a tensor, a number or a text, or leave it out "
                "of what collate_fn returns"
            ) from error
        kinds[name], tensors[f"values.{name}"] = "json", torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with whole(path) as beside:
        text = json.dumps({"kinds": kinds, **about})
        save_file(tensors, beside, {"about": text, "digest": _digest(tensors, text)})


def read_columns(path: Path) -> tuple[dict[str, Column], dict[str, Any]]:
    """Return what `write_columns` wrote.

    Raises:
        CorruptStoreError: the file is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            text, expected = (file.metadata()[name] for name in ("about", "digest"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if _digest(tensors, text) != expected:
            raise ValueError("it has other bytes than were written")
        about = parse_json(text)
        columns = {}
        for name, kind in about.pop("kinds").items():
            values = tensors[f"values.{name}"]
            if kind == "json":
                columns[name] = Column(parse_json(values.numpy().tobytes().decode()))
            else:
                columns[name] = Column(values, tensors.get(f"shapes.{name}"), kind == "number")
        return columns, about
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"{path}: cannot be read ({error}); remove it, and encode again") from error


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    return digest([tensors_digest(tensors), about])


def _numbers(values: Sequence[bool | int | float]) -> Tensor:
    """Return Python's numbers as they are, (N,): bool, int64 or float64; raises DataError for one beyond int64."""
    try:
        return torch.tensor(values, dtype=torch.float64 if any(isinstance(one, float) for one in values) else None)
    except (ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"holds {max(values, key=abs)}, and whole numbers go to 64 bits; make it a text") from error


def _shapes(values: Sequence[Tensor]) -> Tensor:
    return torch.tensor([list(value.shape) for value in values], dtype=torch.int64).reshape(len(values), -1)


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `tensors` in one dtype that holds the values of all."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
