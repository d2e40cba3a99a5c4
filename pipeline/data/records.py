"""Tables with named fields: CSV, TSV, JSON Lines, JSON and Parquet, all as one Arrow table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline.data.source import files_by_split, split_named
from pipeline.errors import BadSampleError, ConfigError, DataError

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Records:
    """N records of a file, or of a folder with a file per split."""

    columns: Mapping[str, pa.ChunkedArray]
    """What was asked for, by setting."""
    files: Sequence[tuple[str, int]]
    """Name of each file, and how many records it has."""
    splits: Sequence[str] | None
    """The split of each file, where there is a file per split."""

    def __len__(self) -> int:
        return sum(count for _, count in self.files)

    def where(self, i: int) -> str:
        """Return the file and the number of record `i`, for people."""
        file, number = self._place(i)
        return f"{self.files[file][0]}#{number}"

    def split(self, i: int) -> str | None:
        """Return the split of record `i`: what its file says, or the split column; None without either."""
        if self.splits is not None:
            return self.splits[self._place(i)[0]]
        column = self.columns.get("split")
        return None if column is None else split_named(column[i].as_py(), self.where(i))

    def text(self, setting: str, i: int) -> str:
        """Return the text of record `i` in the column of a setting.

        Raises:
            BadSampleError: the cell is empty or holds no text.
        """
        value = self.columns[setting][i].as_py()
        if not isinstance(value, str) or not value.strip():
            raise BadSampleError(f"no text: {self.where(i)}, {setting}, has {value!r}; expected a text")
        return value

    def _place(self, i: int) -> tuple[int, int]:
        for file, (_, count) in enumerate(self.files):
            if i < count:
                return file, i
            i -= count
        raise IndexError(i)


def read_records(path: Path, fields: dict[str, str], *, records: str | None) -> Records:
    """Return the columns that `fields` (setting -> field name) asks for, of a file or of a folder's files.

    A folder has a file per split, called after it: train.jsonl, dev.jsonl, test.jsonl.

    Raises:
        ConfigError: a field does not exist (the message names those that do), or the kind of file is unknown.
        DataError: a file cannot be read as its name says.
    """
    if not path.is_dir():
        columns = _read_file(path, fields, records)
        return Records(columns, [(path.name, len(next(iter(columns.values()))))], None)
    if "split" in fields:
        raise ConfigError(f"data.split is {fields['split']!r}, but {path} has a file per split; remove it")
    files = files_by_split(path, KINDS)
    parts = [_read_file(file, fields, records) for file, _ in files]
    counts = [(file.name, len(next(iter(part.values())))) for (file, _), part in zip(files, parts, strict=True)]
    try:
        joined = {name: pa.chunked_array([chunk for part in parts for chunk in part[name].chunks]) for name in parts[0]}
    except pa.ArrowException as error:
        raise DataError(f"data.path {path}: a field differs in type between the files ({error})") from error
    return Records(joined, counts, [split for _, split in files if split])


def _read_file(path: Path, fields: dict[str, str], records: str | None) -> dict[str, pa.ChunkedArray]:
    kinds: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": lambda file: _read_delimited(file, ",", fields),
        ".tsv": lambda file: _read_delimited(file, "\t", fields),
        ".jsonl": lambda file: _from_objects(file, _read_lines(file), fields),
        ".json": lambda file: _from_objects(file, _read_list(file, records), fields),
        ".parquet": pa.parquet.read_table,
    }
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in KINDS or (kind == ".parquet" and path.suffix == ".gz"):
        raise ConfigError(
            f"data.path is {path}; expected a name that ends in {', '.join(KINDS)} (.gz but for the last)"
        )
    try:
        table = kinds[kind](path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise DataError(f"data.path {path} cannot be read as {kind}: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"data.path {path} holds no records")
    for setting, name in fields.items():
        if name not in table.column_names:
            raise ConfigError(f"data.{setting} is {name!r}; {path} has the fields {', '.join(table.column_names)}")
    return {setting: table.column(name) for setting, name in fields.items()}


def _read_delimited(path: Path, delimiter: str, fields: dict[str, str]) -> pa.Table:
    # Texts are texts even where they look like numbers ("007") or like nothing ("null"); labels may be numbers.
    types = {name: pa.string() for setting, name in fields.items() if setting != "label"}
    return pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(strings_can_be_null=False, column_types=types),
    )


def read_text(path: Path) -> str:
    """Return the text of a file, unpacked where its name says it is packed.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    with pa.input_stream(str(path), compression="detect") as stream:
        return bytes(stream.read()).decode("utf-8-sig")


def _read_lines(path: Path) -> list[Any]:
    lines = read_text(path).split("\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
    return objects


def _read_list(path: Path, records: str | None) -> list[Any]:
    """Return the list a JSON file holds: the file itself, the value at key `records`, or the only list there is."""
    loaded = json.loads(read_text(path))
    if isinstance(loaded, list) and records is None:
        return loaded
    lists = {key: value for key, value in loaded.items() if isinstance(value, list)} if isinstance(loaded, dict) else {}
    if records is None and len(lists) == 1:
        return next(iter(lists.values()))
    if records not in lists:
        raise ConfigError(f"data.records is {records!r}; {path} has lists at the keys {', '.join(lists) or '(none)'}")
    return lists[records]


def _from_objects(path: Path, objects: list[Any], fields: dict[str, str]) -> pa.Table:
    """Make a table of the asked fields alone: the others may be nested, or of a type that differs between records."""
    for number, item in enumerate(objects):
        if not isinstance(item, dict):
            raise DataError(f"{path}: record {number} is {type(item).__name__}; expected an object with named fields")
    known = list(dict.fromkeys(key for item in objects for key in item))
    columns = {}
    for name in known:
        wanted = name in fields.values()
        values = [item.get(name) if wanted else None for item in objects]
        try:
            columns[name] = pa.chunked_array([pa.array(values)])
        except pa.ArrowException as error:
            raise DataError(f"{path}: field {name} mixes types ({error}); give every record the same") from error
    return pa.table(columns)
