"""Predictions of samples, and the file they go to: Parquet or JSON lines, a row for each input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pipeline.errors import ConfigError
from pipeline.files import whole
from pipeline.tasks import Column, Kind

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float32(), bool: pa.bool_()}
DESCRIBED = pa.schema([("source", pa.string()), ("key", pa.string()), ("reason", pa.string())])
"""What is said of each input: where it comes from, its key in hex, and what is wrong with a bad one."""
FORMATS = (".parquet", ".jsonl")


class Predictions:
    """Predictions by the number of the row that they are for."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        """Begin with none; `kinds` are the columns."""
        self.schema = pa.schema([(name, _type(kind)) for name, kind in kinds.items()])
        self._rows, self._table = np.empty(0, np.int64), self.schema.empty_table()
        self._added: list[tuple[np.ndarray, Mapping[str, Column]]] = []

    def add(self, rows: np.ndarray, columns: Mapping[str, Column]) -> None:
        """Take in the predictions of `rows` (B,) int64."""
        self._added.append((rows, columns))

    def take(self, rows: np.ndarray) -> pa.Table:
        """Return the predictions of `rows` (n,) int64, in their order; nulls for a row that has none."""
        self._settle()
        places = self._places(rows)
        return self._table.take(pa.array(places, mask=places < 0)).cast(self.schema)

    def keep(self, rows: np.ndarray) -> None:
        """Forget all but `rows`, of those that are there."""
        self._settle()
        rows = rows[self._places(rows) >= 0]
        self._table = self.take(rows)
        self._rows = rows

    def _settle(self) -> None:
        """Make one table of what was added: thousands of columns cost more by the piece than by the value."""
        if self._added:
            columns = [_joined([columns[name] for _, columns in self._added]) for name in self.schema.names]
            arrays = [_array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
            table = pa.table(arrays, self.schema.names)
            kept = [self._table, table.cast(self.schema)] if len(self._rows) else [table]
            self._table = pa.concat_tables(kept)
            self._rows = np.concatenate([self._rows, *(rows for rows, _ in self._added)])
            self._added.clear()

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Return (n,) int64: where each of `rows` lies, -1 where it does not."""
        if not len(self._rows):
            return np.full(len(rows), -1, np.int64)
        order = np.argsort(self._rows)
        near = order[np.minimum(np.searchsorted(self._rows, rows, sorter=order), len(order) - 1)]
        return np.where(self._rows[near] == rows, near, -1)


def described(sources: Sequence[str], keys: Sequence[str | None], reasons: Sequence[str | None]) -> pa.Table:
    """Return the columns of `DESCRIBED`; what has no key, or nothing wrong with it, has None."""
    readable = [name.encode("utf-8", "backslashreplace").decode() for name in sources]
    return pa.table([readable, keys, reasons], schema=DESCRIBED)


def joined(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the columns of all `schemas`, in their order."""
    return pa.schema([field for schema in schemas for field in schema])


def check_format(path: Path) -> None:
    """Raise ConfigError unless the name of `path` says in which format predictions are to be written."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--output is {str(path)!r}; expected a name that ends in {' or '.join(FORMATS)}")


@contextmanager
def open_output(path: Path, schema: pa.Schema) -> Iterator[Callable[[Sequence[pa.Table]], None]]:
    """Give a function that appends rows to the file at `path`, which appears at the end, whole or not at all.

    It takes their columns in as many tables as they come in, which have the fields of `schema` in its order.
    """

    def side_by_side(tables: Sequence[pa.Table]) -> pa.Table:
        return pa.table([column for table in tables for column in table.columns], schema=schema)

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        if path.suffix == ".parquet":
            packed = _all_but_floats(schema)
            options = {
                "compression": dict.fromkeys(packed, "zstd"),
                "use_dictionary": packed,
                "write_statistics": packed,
            }
            with pa.parquet.ParquetWriter(draft, schema, **options) as writer:
                yield lambda tables: writer.write_table(side_by_side(tables))
        else:
            with draft.open("w", encoding="utf-8") as file:
                yield lambda tables: file.writelines(_lines(side_by_side(tables)))


def _all_but_floats(schema: pa.Schema) -> list[str]:
    """Return the Parquet columns that are no floats: packing these takes longer than writing them, and saves 8 %."""
    with pa.BufferOutputStream() as file:
        pa.parquet.write_table(schema.empty_table(), file)
        columns = pa.parquet.ParquetFile(pa.BufferReader(file.getvalue())).schema
    return [column.path for column in map(columns.column, range(len(columns))) if column.physical_type != "FLOAT"]


def _lines(table: pa.Table) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _type(kind: Kind) -> pa.DataType:
    if isinstance(kind, list):
        return pa.list_(_type(kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(name, _type(of)) for name, of in kind.items()])
    return _TYPES[kind]


def _joined(batches: Sequence[Column]) -> Column:
    """Return the values of all batches in one; lists of a length that differs between batches become a list of them."""
    if all(isinstance(batch, np.ndarray) for batch in batches) and len({np.shape(batch)[1:] for batch in batches}) == 1:
        return np.concatenate([np.asarray(batch) for batch in batches])
    return [value for batch in batches for value in batch]


def _array(values: Column, of: pa.DataType) -> pa.Array:
    """Return a column as Arrow has it; arrays are not taken apart into Python's objects.

    Lists of one length are of a type of their own, whose rows are taken ten times as fast.
    """
    if not isinstance(values, np.ndarray) or values.ndim < 2:
        return pa.array(values, of)
    if pa.types.is_struct(of):
        fields = [of.field(number) for number in range(of.num_fields)]
        each = [pa.array(one, field.type) for one, field in zip(values.T, fields, strict=True)]
        return pa.StructArray.from_arrays(each, fields=fields)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), of.value_type), values.shape[1])
