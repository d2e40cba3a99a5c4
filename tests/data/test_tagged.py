"""Sentences with tagged words: what is read of columns and lists, in whichever scheme, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from source_contract import SourceContract

from pipeline.data import DataConfig, Source, open_source
from pipeline.errors import ConfigError, DataError

LINES = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP I-PER\nBlackburn NNP I-PER\n# NN O\n"


def opened(folder: Path, text: str, **settings: Any) -> Source:
    (folder / "words.txt").write_text(text)
    return open_source(DataConfig(source="conll", path=str(folder / "words.txt"), **settings))


def tags(source: Source) -> list[Any]:
    return [source.row(i).targets["tags"] for i in range(len(source))]


class TestConll(SourceContract):
    rows = 2

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "words.txt").write_text(LINES)
        return {"source": "conll", "path": str(folder / "words.txt")}

    def test_words_and_tags(self, source: Source) -> None:
        assert [source.content(i) for i in range(2)] == [["EU", "rejects"], ["Peter", "Blackburn", "#"]]
        assert tags(source) == [["B-ORG", "O"], ["B-PER", "I-PER", "O"]]
        assert [source.row(i).source for i in range(2)] == ["words.txt:3", "words.txt:6"]


class TestConllFolder(SourceContract):
    rows = 6

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "set").mkdir()
        for name in ("eng.train", "dev.conll"):
            (folder / "set" / name).write_text(LINES.replace(" ", "\t"))
        (folder / "set/test.txt.gz").write_bytes(gzip.compress(LINES.encode()))
        (folder / "set/README.md").write_text("What this is.")
        return {"source": "conll", "path": str(folder / "set")}

    def test_files_are_splits(self, source: Source) -> None:
        splits = [source.row(i).split for i in range(6)]
        assert splits == ["validation"] * 2 + ["train"] * 2 + ["test"] * 2


class TestTagged(SourceContract):
    rows = 2

    def make(self, folder: Path) -> dict[str, Any]:
        records = [
            {"tokens": ["EU", "rejects"], "ner": ["S-ORG", "O"], "part": "train", "note": 1},
            {"tokens": ["Peter", "Blackburn"], "ner": ["B-PER", "E-PER"], "part": "dev"},
        ]
        (folder / "set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = {"source": "tagged", "words": "tokens", "tags": "ner", "split": "part"}
        return settings | {"path": str(folder / "set.jsonl")}

    def test_words_and_tags(self, source: Source) -> None:
        assert source.content(1) == ["Peter", "Blackburn"]
        assert tags(source) == [["B-ORG", "O"], ["B-PER", "I-PER"]]
        assert source.row(1).split == "validation"


def test_columns_by_number(tmp_path: Path) -> None:
    source = opened(tmp_path, "1\tNew York\tB-LOC\tx\n2\tis\tO\tx\n", words=1, tags=-2)
    assert source.content(0) == ["New York", "is"]
    assert tags(source) == [["B-LOC", "O"]]


def test_comments_are_no_words(tmp_path: Path) -> None:
    source = opened(tmp_path, "# id = 1\n#a\tO\n# b\nb\tO\n#\tO\n\n\n\n# the end\n\n# O\n")
    assert [source.content(i) for i in range(len(source))] == [["#a", "b", "#"], ["#"]]


@pytest.mark.parametrize(
    ("scheme", "given", "read"),
    [
        ("auto", "I-A I-A B-A I-B O I-B", "B-A I-A B-A B-B O B-B"),
        ("auto", "B-A I-A B-A O B-B", "B-A I-A B-A O B-B"),
        ("auto", "S-A B-A I-A E-A O S-B S-B", "B-A B-A I-A I-A O B-B B-B"),
        ("auto", "U-A B-A L-A", "B-A B-A I-A"),
        ("auto", "B I O", "B-entity I-entity O"),
        ("iob1", "O I-A I-B", "O B-A B-B"),
        ("iob2", "B-A I-A B-B", "B-A I-A B-B"),
        ("bioes", "B-A E-A S-A", "B-A I-A B-A"),
        ("auto", "O O", "O O"),
        ("auto", "B-a-b I-a-b", "B-a-b I-a-b"),
    ],
)
def test_schemes_are_read_alike(tmp_path: Path, scheme: str, given: str, read: str) -> None:
    lines = "".join(f"w\t{tag}\n" for tag in given.split())
    assert tags(opened(tmp_path, lines, scheme=scheme)) == [read.split()]


@pytest.mark.parametrize(
    ("scheme", "given", "message"),
    [
        ("iob2", "O I-A", r"words\.txt:1, word 2: the tag I-A goes on with no entity, which iob2 does not allow"),
        ("iob2", "B-A I-B", r"word 2: the tag I-B goes on with no entity"),
        ("iob1", "S-A", r"word 1: the tag S-A does not occur in iob1; mend it, or set data\.scheme"),
        ("auto", "S-A E-A", r"word 2: the tag E-A goes on with no entity"),
        ("auto", "B-A O S-A", r"word 2: the tag O comes before the end of A"),
        ("auto", "S-A B-A I-A", r"words\.txt:1: the last entity, A, has no end"),
        ("auto", "NOUN", r"words\.txt:1: the tag is 'NOUN'; expected O, or B, I, E or S with a type"),
    ],
)
def test_tags_that_break_their_scheme(tmp_path: Path, scheme: str, given: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "".join(f"w\t{tag}\n" for tag in given.split()), scheme=scheme)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\n", r"words\.txt:2 has 1 columns, the first word 2: \['b'\]; mend the line"),
        ("a O\nb x O\n", r"words\.txt:2 has 3 columns"),
        ("a\nb\n", "words.txt:1 has 1 columns; .*two columns are needed"),
        ("a\tO\n\tO\n", r"words\.txt:2: column 0 \(data\.words\) is empty"),
        ("", "holds no sentences"),
        ("-DOCSTART- O\n\n# nothing\n", "holds no sentences"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, text)


def test_columns_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tags is 3; words\.txt:1 has 2 columns: 0\.\.1, or -1"):
        opened(tmp_path, "a O\n", tags=3)
    with pytest.raises(DataError, match="words are in 1 and tags in -1"):
        opened(tmp_path, "a O\n", words=1)
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe O\n")
    with pytest.raises(DataError, match="cannot be read as text"):
        open_source(DataConfig(source="conll", path=str(tmp_path / "words.txt")))


def test_folders_without_or_with_two_files_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(LINES)
    with pytest.raises(ConfigError, match=r"a folder without a file called after a split, such as train\.txt"):
        open_source(DataConfig(source="conll", path=str(tmp_path)))
    for name in ("train.txt", "dev.txt", "valid.txt"):
        (tmp_path / name).write_text(LINES)
    with pytest.raises(DataError, match=r"dev\.txt and valid\.txt are both the validation split"):
        open_source(DataConfig(source="conll", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["a"], "ner": []}, r"set\.jsonl#1 has 1 words and 0 tags; give every word one"),
        ({"tokens": ["a", ""], "ner": ["O", "O"]}, r"set\.jsonl#1: field tokens is .*; expected a list of texts"),
        ({"tokens": None, "ner": ["O"]}, r"field tokens is 'None'"),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    records = [{"tokens": ["a"], "ner": ["O"]}, record]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(source="tagged", path=str(tmp_path / "set.jsonl"), words="tokens", tags="ner"))


def test_settings_fit_the_source() -> None:
    with pytest.raises(ValueError, match="source conll numbers its columns"):
        DataConfig(source="conll", path="x", tags="ner")
    with pytest.raises(ValueError, match="source tagged names its fields"):
        DataConfig(source="tagged", path="x", words=0, tags="ner")
    with pytest.raises(ValueError, match="window is 20, which source conll does not use"):
        DataConfig(source="conll", path="x", window=20)
    with pytest.raises(ValueError, match="tags is not set; source tagged needs it"):
        DataConfig(source="tagged", path="x", words="w")
