"""Tables with named fields: CSV, TSV, JSON Lines, JSON, Parquet and saved data sets, all as one Arrow table."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline.data.saved import is_saved, read_saved, with_class_names
from pipeline.data.source import split_named
from pipeline.errors import BadSampleError, ConfigError, DataError


def read_records(
    path: Path,
    fields: dict[str, str],
    *,
    records: str | None,
    labels_as_text: bool = False,
    any_of: Collection[str] = (),
) -> dict[str, pa.ChunkedArray]:
    """Return the columns that `fields` (setting -> field name) asks for, by setting; of `any_of` those that exist.

    A saved dictionary of splits has a column `split`, too, unless the field of one is named. Class numbers that have
    names are these names. With `labels_as_text`, a label of CSV is a text even where it looks like a number.

    Raises:
        ConfigError: a field does not exist (the message names those that do), or the kind of file is unknown.
        DataError: the file cannot be read as its name says.
    """
    table, splits = read_saved(path) if is_saved(path) else (_read_file(path, fields, records, labels_as_text), None)
    if table.num_rows == 0:
        raise DataError(f"data.path {path} holds no records")
    if any(fields[setting] in table.column_names for setting in any_of):
        fields = {s: name for s, name in fields.items() if s not in any_of or name in table.column_names}
    for setting, name in fields.items():
        if name not in table.column_names:
            raise ConfigError(f"data.{setting} is {name!r}; {path} has the fields {', '.join(table.column_names)}")
    columns = {setting: with_class_names(table, name) for setting, name in fields.items()}
    return columns if splits is None else {"split": splits} | columns


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
    if kind not in kinds or (kind == ".parquet" and path.suffix == ".gz"):
        raise ConfigError(
            f"data.path is {path}; expected a name that ends in {', '.join(kinds)} (.gz but for the last), or the "
            "folder of a data set that was saved by save_to_disk"
        )
    if not path.is_file():
        raise ConfigError(f"data.path is {path}, a folder; this source reads one file")
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


def text_at(column: pa.ChunkedArray, i: int, where: str) -> str:
    """Return the text at row `i`.

    Raises:
        BadSampleError: the cell is empty or holds no text.
    """
    value = column[i].as_py()
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError(f"no text: {where} has {value!r}; expected a text")
    return value


def split_at(column: pa.ChunkedArray | None, i: int, where: str) -> str | None:
    """Return the split that row `i` of the split column names; None without such a column."""
    return None if column is None else split_named(column[i].as_py(), where)
