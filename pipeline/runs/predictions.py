"""Predictions of samples, and the output file: Parquet or JSON lines, a row for each input."""

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
"""Columns of every output: the source of the input, its key in hex, and the reason if it is bad."""
FORMATS = (".parquet", ".jsonl")


class Predictions:
    """Predictions by row number, held until they are written."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        """Start empty; `kinds` are the columns."""
        self.schema = pa.schema([(name, _type(kind)) for name, kind in kinds.items()])
        self._rows, self._table = np.empty(0, np.int64), self.schema.empty_table()
        self._added: list[tuple[np.ndarray, Mapping[str, Column]]] = []

    def add(self, rows: np.ndarray, columns: Mapping[str, Column]) -> None:
        """Add the predictions of `rows` (B,) int64."""
        self._added.append((rows, columns))

    def take(self, rows: np.ndarray) -> pa.Table:
        """Return the predictions of `rows` (n,) int64, in their order; nulls for a row that has none."""
        self._settle()
        places = self._places(rows)
        return self._table.take(pa.array(places, mask=places < 0)).cast(self.schema)

    def keep(self, rows: np.ndarray) -> None:
        """Drop the predictions of all rows except `rows`."""
        self._settle()
        rows = rows[self._places(rows) >= 0]
        self._table = self.take(rows)
        self._rows = rows

    def _settle(self) -> None:
        """Concatenate what was added into one table: many small columns are slow."""
        if self._added:
            columns = [_concatenated([columns[name] for _, columns in self._added]) for name in self.schema.names]
            arrays = [_array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
            table = pa.table(arrays, self.schema.names)
            kept = [self._table, table.cast(self.schema)] if len(self._rows) else [table]
            self._table = pa.concat_tables(kept)
            self._rows = np.concatenate([self._rows, *(rows for rows, _ in self._added)])
            self._added.clear()

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Return the index of each of `rows` in the table, (n,) int64; -1 if it is absent."""
        if not len(self._rows):
            return np.full(len(rows), -1, np.int64)
        order = np.argsort(self._rows)
        near = order[np.minimum(np.searchsorted(self._rows, rows, sorter=order), len(order) - 1)]
        return np.where(self._rows[near] == rows, near, -1)


def described(sources: Sequence[str], keys: Sequence[str | None], reasons: Sequence[str | None]) -> pa.Table:
    """Return the columns of `DESCRIBED`; what has no key, or nothing wrong with it, has None."""
    readable = [name.encode("utf-8", "backslashreplace").decode() for name in sources]
    return pa.table([readable, keys, reasons], schema=DESCRIBED)


def merged_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the columns of all `schemas`, in their order."""
    return pa.schema([field for schema in schemas for field in schema])


def check_format(path: Path) -> None:
    """Raise ConfigError unless the suffix of `path` is that of a known format."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--output is {str(path)!r}; expected a name that ends in {' or '.join(FORMATS)}")


@contextmanager
def open_output(path: Path, schema: pa.Schema) -> Iterator[Callable[[Sequence[pa.Table]], None]]:
    """Give a function that appends rows to the file at `path`, which is renamed into place at the end.

    The function takes the columns as one or more tables, which together have the fields of `schema` in its order.
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
    """Return the Parquet columns to compress, all but floats: compressing these is slow and saves 8 %."""
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


def _concatenated(batches: Sequence[Column]) -> Column:
    """Concatenate the values of all batches; arrays of rows whose length differs between batches become a list."""
    if all(isinstance(batch, np.ndarray) for batch in batches) and len({np.shape(batch)[1:] for batch in batches}) == 1:
        return np.concatenate([np.asarray(batch) for batch in batches])
    return [value for batch in batches for value in batch]


def _array(values: Column, of: pa.DataType) -> pa.Array:
    """Convert a column to Arrow without creating Python objects.

    Lists of equal length get Arrow's fixed-size list type, whose rows are read ten times as fast.
    """
    if not isinstance(values, np.ndarray) or values.ndim < 2:
        return pa.array(values, of)
    if pa.types.is_struct(of):
        fields = [of.field(number) for number in range(of.num_fields)]
        each = [pa.array(one, field.type) for one, field in zip(values.T, fields, strict=True)]
        return pa.StructArray.from_arrays(each, fields=fields)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), of.value_type), values.shape[1])
