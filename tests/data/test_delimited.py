"""Cells of CSV and TSV: what quotation marks enclose, and which labels are numbers."""

import csv
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.data import DataConfig, Source, open_source
from pipeline.errors import DataError


def opened(path: Path, content: str, **settings: Any) -> Source:
    path.write_text(content, encoding="utf-8", newline="")
    return open_source(DataConfig(source="text", path=str(path), text="text", label="label", **settings))


def labels(source: Source) -> list[Any]:
    return [source.row(i).targets["label"] for i in range(len(source))]


def texts(source: Source) -> list[Any]:
    return [source.content(i) for i in range(len(source))]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["7", "-3", "0"], [7, -3, 0]),
        (["0.5", "2", "1.25"], [0.5, 2.0, 1.25]),
        (["007", "7", "010"], ["007", "7", "010"]),
        (["007", "010"], ["007", "010"]),
        (["+7", "7"], ["+7", "7"]),
        (["1e3", "1000"], ["1e3", "1000"]),
        (["1.0", "1"], ["1.0", "1"]),
        (["1.10", "1.1"], ["1.10", "1.1"]),
        (["12345678901234567890", "12345678901234567891"], ["12345678901234567890", "12345678901234567891"]),
        (["9007199254740993", "9007199254740992"], [9007199254740993, 9007199254740992]),
        (["true", "True", "TRUE"], ["true", "True", "TRUE"]),
        (["2020-01-01", "2020-1-1"], ["2020-01-01", "2020-1-1"]),
        (["1_000", "1000"], ["1_000", "1000"]),
        (["NA", "DE"], ["NA", "DE"]),
        ([" 7", "7"], [" 7", "7"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_two_texts_are_two_classes(tmp_path: Path, name: str, cells: list[str], expected: list[Any]) -> None:
    delimiter = "," if name == "t.csv" else "\t"
    lines = [f"text{delimiter}label", *(f"a{i}{delimiter}{cell}" for i, cell in enumerate(cells))]
    found = labels(opened(tmp_path / name, "\n".join(lines)))
    assert found == expected
    assert [type(label) for label in found] == [type(label) for label in expected]


def test_codes_of_several_fields_of_shards_and_of_pixels(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("1,2,3,4,01\n1,2,3,4,1\n")
    assert labels(open_source(DataConfig(source="pixels", path=str(tmp_path / "p.csv")))) == ["01", "1"]
    (tmp_path / "s.csv").write_text("text,a,b\nx,01,0.5\ny,1,2\n")
    several = open_source(DataConfig(source="text", path=str(tmp_path / "s.csv"), text="text", label=["a", "b"]))
    assert labels(several) == [["01", 0.5], ["1", 2.0]]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train-0.csv").write_text("text,label\na,7\nb,8\n")
    (tmp_path / "set/train-1.csv").write_text("text,label\nc,007\n")
    shards = open_source(DataConfig(source="text", path=str(tmp_path / "set"), text="text", label="label"))
    assert labels(shards) == ["7", "8", "007"]


@pytest.mark.parametrize("empty", ["", "  ", '""'])
@pytest.mark.parametrize("filled", ["pos", "1", "007", "0.5"])
def test_records_without_a_label_are_named(tmp_path: Path, empty: str, filled: str) -> None:
    content = f"text,label\na,{filled}\nb,{empty}\nc,{filled}\nd,{empty}\n"
    with pytest.raises(DataError, match=r"t\.csv: 2 records have no label \(t\.csv#1, t\.csv#3\); give each one"):
        opened(tmp_path / "t.csv", content)


@pytest.mark.parametrize("word", ["NaN", "NA", "null", "n/a"])
def test_a_word_for_nothing_among_numbers_is_no_label(tmp_path: Path, word: str) -> None:
    with pytest.raises(DataError, match=r"1 records have no label \(t\.csv#1\)"):
        opened(tmp_path / "t.csv", f"text,label\na,007\nb,{word}\n")


ROWS = [["text", "label"], ["plain", "p"], ['say "hi"', "n"], ["a\ttab, a comma", "p"], ["two\nlines", "n"]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:3], [*ROWS[:2], ["other", "n"]]], ids=len)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("library", ["csv", "pandas"])
def test_what_is_written_with_quotes_is_read(
    tmp_path: Path, rows: list[list[str]], quoting: Any, delimiter: str, library: str
) -> None:
    stream = io.StringIO(newline="")
    if library == "csv":
        csv.writer(stream, delimiter=delimiter, quoting=quoting).writerows(rows)
    else:
        pd.DataFrame(rows[1:], columns=rows[0]).to_csv(stream, sep=delimiter, quoting=quoting, index=False)
    source = opened(tmp_path / ("t.csv" if delimiter == "," else "t.tsv"), stream.getvalue())
    assert texts(source) == [text for text, _ in rows[1:]]
    assert labels(source) == [label for _, label in rows[1:]]


@pytest.mark.parametrize(
    "lines",
    [
        ['"it opens', "fine", '"another opens'],
        ['"a whole cell"', "fine", '"and" a half'],
        ['"a whole cell"', "fine", "fine too"],
        ['5" long', 'he said "no"', '"', '""'],
        ['"', "fine", "fine"],
    ],
    ids=str,
)
def test_quotes_of_a_tsv_are_characters_where_a_line_is_a_record(tmp_path: Path, lines: list[str]) -> None:
    content = "text\tlabel\n" + "".join(f"{line}\tp\n" for line in lines)
    assert texts(opened(tmp_path / "t.tsv", content)) == lines


def test_a_tsv_that_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    content = 'text\tlabel\na\tp\n"opens\tn\nb\tp\nit closes"\tn\nc\tp\n'
    with pytest.raises(DataError, match=r"t\.tsv, lines 3-5: this is one cell in quotation marks, or each line is a"):
        opened(tmp_path / "t.tsv", content)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('text,label\na,p\n"opens,n\nb,p\n', 3),
        ('text,label\n"one\ntwo",p\n"opens,n\n"another,p\n', 4),
        ('text,label\n"He said "hi" there",p\n', 2),
    ],
)
def test_a_quote_of_a_csv_that_is_not_closed_is_told(tmp_path: Path, content: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"t\.csv, line {line}: a cell begins with a quotation mark, and does not end"):
        opened(tmp_path / "t.csv", content)


def test_a_field_named_twice_is_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"data\.label is 'label' \(twice: name each once\)"):
        opened(tmp_path / "t.csv", "text,label,label\na,p,n\n")
