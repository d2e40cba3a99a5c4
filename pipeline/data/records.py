"""Tables with named fields: CSV, TSV, JSON Lines, JSON, Parquet and saved data sets, all as Arrow columns."""

import json
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipeline.data.config import DataConfig
from pipeline.data.formats import COMMA, TAB, Faults, from_objects, parse, read_delimited, read_labels, read_list
from pipeline.data.source import LeftOut, split_named
from pipeline.data.walk import files_by_split
from pipeline.errors import BadSampleError, ConfigError, DataError

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
STATE, SPLITS = "state.json", "dataset_dict.json"
_FEATURES = b"huggingface"
DELIMITERS = {".csv": COMMA, ".tsv": TAB}
NESTED = frozenset({"messages", "tools", "chosen", "rejected"})
"""Settings of fields with JSON of any form, which a record keeps as text."""
CONTENTS = NESTED | {"text", "text_pair", "anchor", "positive", "prompt", "completion", "image", "audio"}
"""Settings of fields with contents: where one is bad, its record is set aside."""


@dataclass(frozen=True)
class Records:
    """N records of a file, or of a folder with a file per split."""

    columns: Mapping[str, pa.ChunkedArray]
    """The requested columns, by setting."""
    files: Sequence[tuple[str, int, str | None]]
    """Name, number of records and split of each file; None if there is no file per split."""
    left_out: LeftOut
    """Other files of the folder."""
    faults: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Faults of contents known before reading: setting -> record number -> reason."""

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, i: int) -> str:
        """Return the file and the number of record `i`, for people."""
        file, number = self._place(i)
        return f"{self.files[file][0]}#{number}"

    def split(self, i: int) -> str | None:
        """Return the split of record `i`: what its file says, or the split column; None without either."""
        column = self.columns.get("split")
        return self.files[self._place(i)[0]][2] if column is None else split_named(column[i].as_py(), self.where(i))

    def text(self, setting: str, i: int) -> str:
        """Return the text of record `i` in the column of a setting; raises BadSampleError if the cell has no text."""
        if fault := self.fault(setting, i):
            raise BadSampleError(fault)
        value = self.columns[setting][i].as_py()
        if not isinstance(value, str) or not value.strip():
            raise BadSampleError(f"no text: {self.where(i)}, {setting}, has {value!r}; expected a text")
        return value

    def fault(self, setting: str, i: int) -> str | None:
        """Return the fault of the content of record `i`, if one is known."""
        return self.faults.get(setting, {}).get(i)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(count for _, count, _ in self.files))

    def _place(self, i: int) -> tuple[int, int]:
        file = bisect_right(self._ends, i)
        return file, i - (self._ends[file - 1] if file else 0)


def read_records(
    path: Path, config: DataConfig, contents: Sequence[str], labels: Sequence[str] = ("label", "split", "group")
) -> Records:
    """Return the columns that the settings `contents` and, if `config` is labelled, `labels` name.

    Several names of a setting are `label`, `label.1`, ... `path` is a file, a folder with files of splits
    (`files_by_split`), or a data set saved by Hugging Face datasets, whose class numbers become names. In CSV and TSV
    all is text but labels, which `read_labels` converts unless a delimiter separates several. Of pairs without labels,
    one of the two texts is enough.

    Raises:
        ConfigError: a field does not exist (the message names those that do), or the kind of file is unknown.
        DataError: a file cannot be read as its name says.
    """
    left_out, faults = LeftOut(), Faults()
    fields = dict[str, str]()
    for setting in (*contents, *(labels if config.labelled else ())):
        value = getattr(config, setting)
        for number, name in enumerate(value if isinstance(value, tuple) else (value,)):
            if name is not None:
                fields[f"{setting}.{number}" if number else setting] = str(name)
    if is_saved(path):
        parts = read_saved(path)
    else:
        parts, count = [], 0
        for file, split in files_by_split(path, left_out, KINDS):
            table, wrong = _read_file(file, fields, config.records)
            parts.append((file, split, table))
            for setting in [setting for setting, name in fields.items() if name in wrong]:
                of_file = {count + row: reason for row, reason in wrong[fields[setting]].items()}
                faults[setting] = faults.get(setting, {}) | of_file
            count += table.num_rows
    if "split" in fields and any(split for _, split, _ in parts):
        raise ConfigError(f"data.split is {fields['split']!r}, but {path} has a file per split; remove it")
    any_of = set() if config.labelled else {"anchor", "positive"} & set(fields)
    columns = [_choose(file, table, fields, any_of) for file, _, table in parts]
    delimited = [part for part, (file, _, _) in zip(columns, parts, strict=True) if kind_of(file) in DELIMITERS]
    for setting in [name for name in columns[0] if name.partition(".")[0] == "label"]:
        if delimited and config.delimiter is None:  # numbers in all files, or in none
            labels = read_labels([part[setting] for part in delimited])
            for part, column in zip(delimited, labels, strict=True):
                part[setting] = column
    try:
        merged = {name: pa.chunked_array([c for part in columns for c in part[name].chunks]) for name in columns[0]}
    except pa.ArrowException as error:
        raise DataError(f"data.path {path}: a field differs in type between the files ({error})") from error
    names = [file.relative_to(path).as_posix() if file != path else file.name for file, _, _ in parts]
    files = [(name, len(table), split) for name, (_, split, table) in zip(names, parts, strict=True)]
    return Records(merged, files, left_out, faults)


def kind_of(file: Path) -> str:
    """Return the extension of a file, without that of a compression."""
    return file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix


def _choose(file: Path, table: pa.Table, fields: dict[str, str], any_of: Collection[str]) -> dict[str, pa.ChunkedArray]:
    """Return the requested columns of a table, by setting."""
    if table.num_rows == 0:
        raise DataError(f"data.path {file} holds no records")
    if any(fields[setting] in table.column_names for setting in any_of):
        fields = {s: name for s, name in fields.items() if s not in any_of or name in table.column_names}
    for setting, name in fields.items():
        if (count := table.column_names.count(name)) != 1:
            twice = " (twice: name each once)" if count else ""
            known = ", ".join(table.column_names)
            raise ConfigError(f"data.{setting} is {name!r}{twice}; {file} has the fields {known}")
    return {setting: with_class_names(table, name) for setting, name in fields.items()}


def _read_file(path: Path, fields: dict[str, str], records: str | None) -> tuple[pa.Table, Faults]:
    kind, names = kind_of(path), frozenset(fields.values())
    if kind not in KINDS or (kind == ".parquet" and path.suffix == ".gz"):
        raise ConfigError(
            f"data.path is {path}; expected a name that ends in {', '.join(KINDS)} (.gz but for the last), a folder "
            "with such files of splits, or a data set saved by save_to_disk"
        )
    if kind not in (".jsonl", ".json"):
        return read_arrow(path, names), {}
    others = {name for setting, name in fields.items() if setting not in CONTENTS}
    nested = [fields[setting] for setting in NESTED & fields.keys()]
    objects = read_objects(path, records)
    for item in objects if nested else ():
        if isinstance(item, dict):
            found = {name: item[name] for name in nested if name in item}
            item.update({name: one if isinstance(one, str) else json.dumps(one) for name, one in found.items()})
    return from_objects(path, objects, names, names - others)


def read_arrow(path: Path, texts: Collection[str] = ()) -> pa.Table:
    """Return the table of a Parquet, CSV or TSV file, of the latter two the columns `texts` as texts.

    Raises:
        DataError: it cannot be read.
    """
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            return pa.parquet.read_table(path)
        return read_delimited(path, _read_bytes(path), DELIMITERS[kind], texts)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"data.path {path} cannot be read as {kind}: {error}") from error


def read_objects(path: Path, records: str | None = None) -> list[Any]:
    """Return the values of a JSON Lines file, or the list in a JSON file, as `read_list`; raises DataError."""
    text = read_text(path, kind_of(path))
    if kind_of(path) == ".json":
        return read_list(path, text, records)
    lines = enumerate(text.split("\n"), 1)
    return [parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if its name says so."""
    with pa.input_stream(str(path), compression="detect") as stream:
        return bytes(stream.read())


def read_text(path: Path, kind: str) -> str:
    """Return the text of a file, decompressed if its name says so; raises DataError, with `kind`, if there is none."""
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"data.path {path} cannot be read as {kind}: {error}") from error


def is_saved(path: Path) -> bool:
    """Return whether `path` is a folder that `save_to_disk` wrote, of one data set or of a dictionary of splits."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def read_saved(path: Path) -> list[tuple[Path, str | None, pa.Table]]:
    """Return folder, split and table of each part of the data set at `path`; one without splits is one part.

    Tables are memory-mapped by pyarrow, without the data set's code, cache or pickles. Raises DataError if a file is
    missing or damaged, or names one outside the folder, or a split is called unusually.
    """
    if not (path / SPLITS).is_file():
        return [(path, None, _read_one(path))]
    names = [_plain(name, path / SPLITS) for name in _read_json(path / SPLITS, "splits")]
    return [(path / name, split_named(name, str(path)), _read_one(path / name)) for name in names]


def with_class_names(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return the column `name`, with class numbers replaced by names, -1 by null; raises DataError if one has no name.

    The names are in the metadata of tables of Hugging Face datasets, in Parquet too.
    """
    if (names := _class_names(table, name)) is None:
        return table.column(name)
    flat = table.column(name).combine_chunks()
    numbers = flat.flatten() if pa.types.is_list(flat.type) else flat
    try:
        numbers = numbers.cast(pa.int64())
        numbers = pa.compute.if_else(pa.compute.equal(numbers, -1), None, numbers)
        labels = pa.array(names, pa.string()).take(numbers)
    except pa.ArrowException as error:
        raise DataError(f"field {name} has a class number beyond its {len(names)} names ({error})") from error
    if not pa.types.is_list(flat.type):
        return pa.chunked_array([labels])
    first = pa.compute.min(flat.offsets)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.compute.subtract(flat.offsets, first), labels)])


def _read_one(folder: Path) -> pa.Table:
    tables = []
    for item in _read_json(folder / STATE, "_data_files"):
        file = folder / _plain(item.get("filename") if isinstance(item, dict) else item, folder / STATE)
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read as an Arrow stream ({error}); save the data set again") from error
    if not tables:
        raise DataError(f"data.path {folder} holds no records")
    return pa.concat_tables(tables)


def _read_json(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); save the data set again") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: {key} is {found!r}; expected a list; save the data set again")
    return found


def _plain(name: object, where: Path) -> str:
    """Return a name that stays in its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
        raise DataError(f"{where} names {name!r}; expected a name in the same folder")
    return name


def _class_names(table: pa.Table, name: str) -> Sequence[str] | None:
    try:
        features = json.loads((table.schema.metadata or {})[_FEATURES])["info"]["features"]
        feature = features[name]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(feature, list) and len(feature) == 1:  # how a list was written before it had a type
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    found: Sequence[str] | None = feature.get("names") if isinstance(feature, dict) else None
    return found
