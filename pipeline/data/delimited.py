"""CSV and TSV: whether quotation marks enclose cells, and whether labels are numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.errors import DataError

COMMA, TAB = b",", b"\t"
_BOM = b"\xef\xbb\xbf"
_QUOTED = rb'"[^"]*+(?:""[^"]*+)*+"(?=[%s\r\n]|\Z)'
_OPENING = rb'(?:\A|[%s\r\n])"'
_NOTHING = frozenset({"", "#N/A", "N/A", "NA", "NaN", "nan", "NULL", "null", "None", "<NA>", "n/a"})
"""Texts for a missing number in a numeric column."""


@dataclass
class _Quotes:
    """The structure of a file, read with quotation marks that enclose cells."""

    count: int = 0
    """Number of cells that begin with a quotation mark."""
    doubled: int = 0
    """Number of those that contain quotation marks, too."""
    broken: tuple[int, int] | None = None
    """The first and the last line of the first cell that goes over several."""
    fault: int | None = None
    """The line of the first cell that is not enclosed as a whole."""
    rest: bytes = b""
    """The file with every enclosed cell replaced by one character."""


def read_delimited(path: Path, data: bytes, delimiter: bytes, texts: Collection[str]) -> pa.Table:
    """Return the table in `data`, the content of the file at `path`; the columns `texts` are read as texts.

    In CSV a cell that begins with a quotation mark is enclosed in them (RFC 4180). In TSV quotation marks enclose cells
    if that holds for all such cells, and lines would break otherwise, or each has a doubled mark, or every record has
    one; else they are characters, and a line is a record.

    Raises:
        DataError: a cell is not enclosed as a whole, or a TSV can be read in two ways; the message names the lines.
    """
    data = data.removeprefix(_BOM)
    quotes = _quotes(data, delimiter) if b'"' in data else _Quotes()
    if delimiter == COMMA and quotes.fault is not None:
        raise DataError(
            f"{path}, line {quotes.fault}: a cell begins with a quotation mark, and does not end with one; enclose the "
            "whole cell, and double the quotation marks inside it"
        )
    encloses = delimiter == COMMA or _encloses(path, data, delimiter, quotes)
    quote = '"' if encloses else False
    parse = pa.csv.ParseOptions(delimiter=delimiter.decode(), quote_char=quote, newlines_in_values=encloses)
    convert = pa.csv.ConvertOptions(strings_can_be_null=False, column_types=dict.fromkeys(texts, pa.string()))
    return pa.csv.read_csv(pa.BufferReader(data), parse_options=parse, convert_options=convert)


def _encloses(path: Path, data: bytes, delimiter: bytes, quotes: _Quotes) -> bool:
    """Return True where the quotation marks of a TSV enclose cells."""
    if not quotes.count or quotes.fault is not None or not _is_even(quotes.rest, delimiter):
        return False
    if not _is_even(data, delimiter):
        return True
    if quotes.broken is not None:
        raise DataError(
            f"{path}, lines {quotes.broken[0]}-{quotes.broken[1]}: this is one cell in quotation marks, or each line "
            "is a record; remove the marks that begin and end it, or double them and enclose their cells"
        )
    records = sum(1 for line in data.splitlines() if line) - 1
    return quotes.doubled == quotes.count or quotes.count >= records


def _quotes(data: bytes, delimiter: bytes) -> _Quotes:
    opening, cell = re.compile(_OPENING % delimiter), re.compile(_QUOTED % delimiter)
    quotes, pieces, place = _Quotes(), [], 0
    while found := opening.search(data, place):
        begin = found.end() - 1
        quotes.count += 1
        if (whole := cell.match(data, begin)) is None:
            quotes.fault = _line(data, begin)
            return quotes
        pieces.append(data[place:begin])
        place, inner = whole.end(), data[begin + 1 : whole.end() - 1]
        quotes.doubled += b'"' in inner
        if quotes.broken is None and b"\n" in inner:
            quotes.broken = (_line(data, begin), _line(data, place))
    quotes.rest = b"x".join([*pieces, data[place:]])
    return quotes


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
    kind = _kind_of(labels)
    return [pc.if_else(pc.is_in(column, blank), None, column).cast(kind) for column in columns]


def is_number(text: str) -> bool:
    """Return whether a text is a number, in the digits of ASCII."""
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text


def _kind_of(labels: Sequence[str]) -> Any:
    if all(re.fullmatch("0|-?[1-9][0-9]{0,18}", label) and abs(int(label)) < 2**63 for label in labels):
        return pa.int64()
    written = {repr(float(label)) for label in labels}
    same = all(repr(float(label)) in (label, f"{label}.0") for label in labels)
    return pa.float64() if same and len(written) == len(labels) else pa.string()
