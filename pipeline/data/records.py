"""Tables with named fields: CSV, TSV, JSON Lines, JSON, Parquet and saved data sets, all as Arrow columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline.data.saved import is_saved, read_saved, with_class_names
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


def read_records(
    path: Path,
    fields: dict[str, str],
    *,
    records: str | None,
    labels_as_text: bool = False,
    any_of: Collection[str] = (),
) -> Records:
    """Return the columns that `fields` (setting -> field name) asks for, of a file or of a folder; of `any_of` those
    that exist.

    A folder has a file per split, called after it (train.jsonl, dev.jsonl, test.jsonl), or is a data set saved by
    Hugging Face datasets. Class numbers that have names are these names. With `labels_as_text`, a label of CSV is a
    text even where it looks like a number.

    Raises:
        ConfigError: a field does not exist (the message names those that do), or the kind of file is unknown.
        DataError: a file cannot be read as its name says.
    """
    if is_saved(path):
        parts = read_saved(path)
    else:
        files = files_by_split(path, KINDS)
        parts = [(file, split, _read_file(file, fields, records, labels_as_text)) for file, split in files]
    splits = [split for _, split, _ in parts if split is not None]
    if splits and "split" in fields:
        raise ConfigError(f"data.split is {fields['split']!r}, but {path} has a file per split; remove it")
    columns = [_choose(file, table, fields, any_of) for file, _, table in parts]
    try:
        joined = {name: pa.chunked_array([c for part in columns for c in part[name].chunks]) for name in columns[0]}
    except pa.ArrowException as error:
        raise DataError(f"data.path {path}: a field differs in type between the files ({error})") from error
    return Records(joined, [(file.name, table.num_rows) for file, _, table in parts], splits or None)


def _choose(file: Path, table: pa.Table, fields: dict[str, str], any_of: Collection[str]) -> dict[str, pa.ChunkedArray]:
    """Return the columns of a table that were asked for, by setting."""
    if table.num_rows == 0:
        raise DataError(f"data.path {file} holds no records")
    if any(fields[setting] in table.column_names for setting in any_of):
        fields = {s: name for s, name in fields.items() if s not in any_of or name in table.column_names}
    for setting, name in fields.items():
        if name not in table.column_names:
            raise ConfigError(f"data.{setting} is {name!r}; {file} has the fields {', '.join(table.column_names)}")
    return {setting: with_class_names(table, name) for setting, name in fields.items()}


def _read_file(path: Path, fields: dict[str, str], records: str | None, labels_as_text: bool) -> pa.Table:
    # Texts are texts even where they look like numbers ("007") or like nothing ("null"); labels may be numbers.
    texts = [name for setting, name in fields.items() if labels_as_text or setting.partition(".")[0] != "label"]
    kinds: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": lambda file: _read_delimited(file, ",", texts),
        ".tsv": lambda file: _read_delimited(file, "\t", texts),
        ".jsonl": lambda file: _from_objects(file, _read_lines(file), fields),
        ".json": lambda file: _from_objects(file, _read_list(file, records), fields),
        ".parquet": pa.parquet.read_table,
    }
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in KINDS or (kind == ".parquet" and path.suffix == ".gz"):
        raise ConfigError(
            f"data.path is {path}; expected a name that ends in {', '.join(KINDS)} (.gz but for the last), a folder "
            "with such a file per split, or a data set that was saved by save_to_disk"
        )
    try:
        return kinds[kind](path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise DataError(f"data.path {path} cannot be read as {kind}: {error}") from error


def _read_delimited(path: Path, delimiter: str, texts: list[str]) -> pa.Table:
    return pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            strings_can_be_null=False, column_types=dict.fromkeys(texts, pa.string())
        ),
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
