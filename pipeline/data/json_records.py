"""JSON and JSON Lines as tables; a content that is not text is one bad sample, other faults name the record."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from pipeline.errors import ConfigError, DataError

Faults: TypeAlias = dict[str, dict[int, str]]
"""Faults: field -> record number -> reason."""

_SHOWN = 40


def read_lines(path: Path, text: str) -> list[Any]:
    """Return the values of JSON Lines; empty lines are skipped; raises DataError if a line is not JSON."""
    lines = enumerate(text.split("\n"), 1)
    return [parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def read_list(path: Path, text: str, records: str | None) -> list[Any]:
    """Return the list a JSON file holds: the file itself, the value at key `records`, or the only list there is."""
    loaded = parse(text, f"data.path {path} cannot be read as .json")
    if isinstance(loaded, list) and records is None:
        return loaded
    lists = {key: value for key, value in loaded.items() if isinstance(value, list)} if isinstance(loaded, dict) else {}
    if records is None and len(lists) == 1:
        return next(iter(lists.values()))
    if records not in lists:
        raise ConfigError(f"data.records is {records!r}; {path} has lists at the keys {', '.join(lists) or '(none)'}")
    return lists[records]


def parse(text: str, where: str) -> Any:
    """Parse JSON; raises DataError, with `where`, if it is invalid, nested too deeply, or has too long a number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deep to be read; make it flat") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}; write it as a text") from error


def from_objects(
    path: Path, objects: Sequence[Any], wanted: Collection[str], contents: Collection[str]
) -> tuple[pa.Table, Faults]:
    """Return a table with values of the `wanted` fields only: others may be nested, or differ in type between records.

    A fault in one record of a field of `contents` is returned, and its cell is empty.

    Raises:
        DataError: a record is no object; or a field mixes types, or holds in one record what no table can.
    """
    for number, item in enumerate(objects):
        if not isinstance(item, dict):
            raise DataError(f"{path}: record {number} is {type(item).__name__}; expected an object with named fields")
    columns, faults = {}, Faults()
    for name in dict.fromkeys(key for item in objects for key in item):
        values = [item.get(name) if name in wanted else None for item in objects]
        wrong = _wrong(values)
        if wrong and name not in contents:
            number, reason = next(iter(wrong.items()))
            raise DataError(f"{path}: field {name} of record {number} {reason}; mend it ({len(wrong)} such records)")
        if wrong:
            faults[name] = wrong
        column = _column(path, name, [None if i in wrong else value for i, value in enumerate(values)])
        plain = name.encode("utf-8", "backslashreplace").decode()
        columns[plain] = column.cast(pa.string()) if wrong and pa.types.is_null(column.type) else column
    return pa.table(columns), faults


def _column(path: Path, name: str, values: list[Any]) -> pa.ChunkedArray:
    try:
        return pa.chunked_array([pa.array(values)])
    except (pa.ArrowException, OverflowError) as error:
        kinds = [type(value) for value in values if value is not None]
        odd = next((i for i, value in enumerate(values) if value is not None and type(value) is not kinds[0]), 0)
        raise DataError(f"{path}: field {name} mixes types, from record {odd} on ({error}); use one") from error


def _wrong(values: list[Any]) -> dict[int, str]:
    """Return the fault of each value that a table cannot hold."""
    try:
        if not pa.types.is_unsigned_integer(pa.array(values).type):
            return {}
    except (pa.ArrowException, OverflowError, UnicodeError, RecursionError):
        pass
    return {number: reason for number, value in enumerate(values) if (reason := _fault(value))}


def _fault(value: Any) -> str | None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"holds {value}, a whole number beyond 64 bits; write it as a text"
    try:
        pa.array([value])
    except UnicodeError:
        return f"is no text: {ascii(value)[:_SHOWN]} holds half of a character (a lone surrogate)"
    except (pa.ArrowException, OverflowError, RecursionError) as error:
        return f"cannot be kept: {str(error)[:_SHOWN]}"
    return None
