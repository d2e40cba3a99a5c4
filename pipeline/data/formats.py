"""Texts as tables. CSV and TSV: whether quotation marks enclose cells, and whether labels are numbers. JSON and JSON
Lines: a content that is not text is one bad sample, other faults name the record.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.errors import ConfigError, DataError

COMMA, TAB = b",", b"\t"
_BOM = b"\xef\xbb\xbf"
_QUOTED = rb'"(?<![^%s\r\n]")(?:([^"]*+(?:""[^"]*+)*+)"(?=[%s\r\n]|\Z))?'
"""A cell that begins with a quotation mark; its content is group 1 if the cell is enclosed as a whole."""
_NOTHING = frozenset({"", "#N/A", "N/A", "NA", "NaN", "nan", "NULL", "null", "None", "<NA>", "n/a"})
"""Texts for a missing number in a numeric column."""
Faults: TypeAlias = dict[str, dict[int, str]]
"""Faults: field -> record number -> reason."""

_SHOWN = 40


def read_delimited(path: Path, data: bytes, delimiter: bytes, texts: Collection[str]) -> pa.Table:
    """Return the table in `data`, the content of the file at `path`; the columns `texts` are read as texts.

    In CSV a cell that begins with a quotation mark is enclosed in them (RFC 4180). In TSV quotation marks enclose cells
    if that holds for all such cells, and lines would break otherwise, or each has a doubled mark, or every record has
    one; else they are characters, and a line is a record. Raises DataError, with the lines, if a cell is not enclosed
    as a whole, or a TSV can be read in two ways.
    """
    data = data.removeprefix(_BOM)
    cell = re.compile(_QUOTED % (delimiter, delimiter))
    torn = next((found for found in cell.finditer(data) if found[1] is None), None)
    if delimiter == COMMA and torn is not None:
        raise DataError(
            f"{path}, line {_line(data, torn.start())}: a cell begins with a quotation mark, and does not end with "
            "one; enclose the whole cell, and double the quotation marks inside it"
        )
    encloses = delimiter == COMMA or (torn is None and _encloses(path, data, delimiter, cell))
    quote = '"' if encloses else False
    parse = pa.csv.ParseOptions(delimiter=delimiter.decode(), quote_char=quote, newlines_in_values=encloses)
    convert = pa.csv.ConvertOptions(strings_can_be_null=False, column_types=dict.fromkeys(texts, pa.string()))
    return pa.csv.read_csv(pa.BufferReader(data), parse_options=parse, convert_options=convert)


def _encloses(path: Path, data: bytes, delimiter: bytes, cell: re.Pattern[bytes]) -> bool:
    """Return True where the quotation marks of a TSV, in which no `cell` is torn, enclose cells."""
    cells = list(cell.finditer(data))
    if not cells or not _is_even(cell.sub(b"x", data), delimiter):
        return False
    if not _is_even(data, delimiter):
        return True
    if broken := next((found for found in cells if b"\n" in found[1]), None):
        raise DataError(
            f"{path}, lines {_line(data, broken.start())}-{_line(data, broken.end())}: this is one cell in quotation "
            "marks, or each line is a record; remove the marks that begin and end it, or double them and enclose their "
            "cells"
        )
    records = sum(1 for line in data.splitlines() if line) - 1
    return all(b'"' in found[1] for found in cells) or len(cells) >= records


def _line(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _is_even(data: bytes, delimiter: bytes) -> bool:
    """Return True where all lines have as many cells as the first."""
    return len({line.count(delimiter) for line in data.splitlines() if line}) == 1


def read_labels(columns: Sequence[pa.ChunkedArray]) -> list[pa.ChunkedArray]:
    """Return labels of text, of several files, as numbers where that loses nothing; nothing in such a column is null.

    They are int64 if all are written as whole numbers ("7", not "007"), float64 if all are written as numbers and no
    two are equal ("0.5" beside "5e-1"); else they stay texts: two texts are two classes.
    """
    unique: list[str] = pc.unique(pa.chunked_array([c for column in columns for c in column.chunks])).to_pylist()
    labels = [text for text in unique if text.strip() not in _NOTHING]
    if not labels or not all(is_number(label) for label in labels):
        return list(columns)
    blank = pa.array([text for text in unique if text.strip() in _NOTHING], pa.string())
    kind = pa.string()
    if all(re.fullmatch("0|-?[1-9][0-9]{0,18}", label) and abs(int(label)) < 2**63 for label in labels):
        kind = pa.int64()
    elif len({repr(float(label)) for label in labels}) == len(labels) and all(
        repr(float(label)) in (label, f"{label}.0") for label in labels
    ):
        kind = pa.float64()
    return [pc.if_else(pc.is_in(column, blank), None, column).cast(kind) for column in columns]


def is_number(text: str) -> bool:
    """Return whether a text is a number, in the digits of ASCII."""
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text


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

    A fault in one record of a field of `contents` is returned, and its cell is empty. Raises DataError if a record is
    no object, or another field mixes types, or holds in one record what no table can.
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
        values = [None if i in wrong else value for i, value in enumerate(values)]
        try:
            column = pa.chunked_array([pa.array(values)])
        except (pa.ArrowException, OverflowError) as error:
            kinds = [type(value) for value in values if value is not None]
            odd = next((i for i, value in enumerate(values) if value is not None and type(value) is not kinds[0]), 0)
            raise DataError(f"{path}: field {name} mixes types, from record {odd} on ({error}); use one") from error
        plain = name.encode("utf-8", "backslashreplace").decode()
        columns[plain] = column.cast(pa.string()) if wrong and pa.types.is_null(column.type) else column
    return pa.table(columns), faults


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
