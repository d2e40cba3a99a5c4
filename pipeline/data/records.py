"""Tables with named fields: CSV, TSV, JSON Lines, JSON, Parquet and saved data sets, all as Arrow columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from pipeline.data.delimited import COMMA, TAB, read_delimited, read_labels
from pipeline.data.json_records import Faults, from_objects, read_lines, read_list
from pipeline.data.saved import is_saved, read_saved, with_class_names
from pipeline.data.source import LeftOut, split_named
from pipeline.data.walk import files_by_split
from pipeline.errors import BadSampleError, ConfigError, DataError

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
DELIMITERS = {".csv": COMMA, ".tsv": TAB}
CONTENTS = frozenset({"text", "text_pair", "anchor", "positive", "image", "audio"})
"""Settings of fields with contents: where one is bad, its record is set aside."""


@dataclass(frozen=True)
class Records:
    """N records of a file, or of a folder with a file per split."""

    columns: Mapping[str, pa.ChunkedArray]
    """The requested columns, by setting."""
    files: Sequence[tuple[str, int]]
    """Name and number of records of each file."""
    splits: Sequence[str] | None
    """The split of each file, if there is a file per split."""
    left_out: LeftOut
    """Other files of the folder."""
    faults: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Faults of contents known before reading: setting -> record number -> reason."""

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
        return list(accumulate(count for _, count in self.files))

    def _place(self, i: int) -> tuple[int, int]:
        file = bisect_right(self._ends, i)
        return file, i - (self._ends[file - 1] if file else 0)


def read_records(
    path: Path,
    fields: dict[str, str],
    *,
    records: str | None,
    labels_as_text: bool = False,
    any_of: Collection[str] = (),
) -> Records:
    """Return the columns `fields` (setting -> field name) of a file or a folder; those in `any_of` are optional.

    A folder has files of splits (`files_by_split`), or is a data set saved by Hugging Face datasets, whose class
    numbers become names. In CSV and TSV all is text but labels, which `read_labels` converts unless `labels_as_text`.

    Raises:
        ConfigError: a field does not exist (the message names those that do), or the kind of file is unknown.
        DataError: a file cannot be read as its name says.
    """
    left_out, faults = LeftOut(), Faults()
    if is_saved(path):
        parts = read_saved(path)
    else:
        parts, count = [], 0
        for file, split in files_by_split(path, left_out, KINDS):
            table, wrong = _read_file(file, fields, records)
            parts.append((file, split, table))
            for setting in [setting for setting, name in fields.items() if name in wrong]:
                of_file = {count + row: reason for row, reason in wrong[fields[setting]].items()}
                faults[setting] = faults.get(setting, {}) | of_file
            count += table.num_rows
    splits = [split for _, split, _ in parts if split is not None]
    if splits and "split" in fields:
        raise ConfigError(f"data.split is {fields['split']!r}, but {path} has a file per split; remove it")
    columns = [_choose(file, table, fields, any_of) for file, _, table in parts]
    delimited = [part for part, (file, _, _) in zip(columns, parts, strict=True) if kind_of(file) in DELIMITERS]
    for setting in [name for name in columns[0] if name.partition(".")[0] == "label"]:
        if delimited and not labels_as_text:  # numbers in all files, or in none
            labels = read_labels([part[setting] for part in delimited])
            for part, column in zip(delimited, labels, strict=True):
                part[setting] = column
    try:
        merged = {name: pa.chunked_array([c for part in columns for c in part[name].chunks]) for name in columns[0]}
    except pa.ArrowException as error:
        raise DataError(f"data.path {path}: a field differs in type between the files ({error})") from error
    files = [(file.relative_to(path).as_posix() if file != path else file.name, len(table)) for file, _, table in parts]
    return Records(merged, files, splits or None, left_out, faults)


def kind_of(file: Path) -> str:
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
    try:
        if kind == ".parquet":
            return pa.parquet.read_table(path), {}
        if kind in DELIMITERS:
            return read_delimited(path, read_bytes(path), DELIMITERS[kind], names), {}
        text = read_text(path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"data.path {path} cannot be read as {kind}: {error}") from error
    objects = read_lines(path, text) if kind == ".jsonl" else read_list(path, text, records)
    others = {name for setting, name in fields.items() if setting not in CONTENTS}
    return from_objects(path, objects, names, names - others)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if its name says so; raises OSError if it cannot be read."""
    with pa.input_stream(str(path), compression="detect") as stream:
        return bytes(stream.read())


def read_text(path: Path) -> str:
    """Return the text of a file, decompressed if its name says so; raises OSError or UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8-sig")
