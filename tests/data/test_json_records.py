"""JSON that no table can hold: one bad sample, or a message that names the record."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.data import DataConfig, Source, open_source
from pipeline.encode.keying import key_contents
from pipeline.errors import BadSampleError, DataError

HALF = "\ud83d"


def opened(folder: Path, *records: object, **settings: Any) -> Source:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    fields = {"source": "text", "text": "text", "label": "label"} if "source" not in settings else {}
    return open_source(DataConfig(**{"path": str(folder / "t.jsonl")} | fields | settings))


GOOD = {"text": "a", "label": "x"}


@pytest.mark.parametrize("text", [f"a {HALF}", "\udc00", HALF * 3])
def test_half_a_character_is_one_bad_sample(tmp_path: Path, text: str) -> None:
    source = opened(tmp_path, GOOD, GOOD | {"text": text}, GOOD)
    with pytest.raises(BadSampleError, match=r"is no text: '.*\\ud.* holds half of a character \(a lone surrogate\)"):
        source.content(1)
    assert [source.content(i) for i in (0, 2)] == ["a", "a"]
    assert [bad.row for bad in key_contents(source, workers=1).bad] == [1]


def test_of_a_later_shard_of_a_partner_and_of_a_path(tmp_path: Path) -> None:
    for number, text in enumerate(["a", HALF]):
        (tmp_path / f"train-{number}.jsonl").write_text(json.dumps(GOOD | {"text": text}) + "\n")
    shards = open_source(DataConfig(source="text", path=str(tmp_path), text="text", label="label"))
    assert [bad.source for bad in key_contents(shards, workers=1).bad] == ["train-1.jsonl#0"]
    pair = {"q": "a", "a": HALF}
    pairs = opened(tmp_path, {"q": "a", "a": "b"}, pair, source="pairs", anchor="q", positive="a")
    assert [bad.row for bad in key_contents(pairs, workers=1).bad] == [3]
    files = opened(
        tmp_path, {"f": "a.png", "l": 1}, {"f": f"{HALF}.png", "l": 1}, source="images", image="f", label="l"
    )
    with pytest.raises(BadSampleError, match="half of a character"):
        files.content(1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (HALF, "half of a character"),
        ([HALF], "half of a character"),
        (2**70, "a whole number beyond 64 bits; write it as a text"),
        (2**63, "a whole number beyond 64 bits"),
        (-(2**63) - 1, "a whole number beyond 64 bits"),
    ],
)
@pytest.mark.parametrize("name", ["label", "group", "split"])
def test_what_is_known_of_a_sample_is_named_with_its_record(
    tmp_path: Path, name: str, value: object, reason: str
) -> None:
    good = {"text": "a", "label": "x" if isinstance(value, str) else 1, "group": "g", "split": "train"}
    with pytest.raises(DataError, match=rf"t\.jsonl: field {name} of record 2 .*{reason}"):
        opened(tmp_path, good, good, good | {name: value}, group="group", split="split")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ' + "[" * 100_000, "line 2: nested too deep to be read"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "line 2: Exceeds the limit"),
        ('{"text": "a"', "line 2: not JSON"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, GOOD, line)


@pytest.mark.parametrize("label", [None, "", "  ", "\n", float("nan")])
def test_records_without_a_label_are_named(tmp_path: Path, label: object) -> None:
    good = GOOD | ({"label": 0.5} if isinstance(label, float) else {})
    with pytest.raises(DataError, match=r"1 records have no label \(t\.jsonl#1\); give each one, or leave them out"):
        opened(tmp_path, good, good | {"label": label})
    with pytest.raises(DataError, match=r"1 records have no label \(t\.jsonl#2\)"):
        opened(tmp_path, GOOD, GOOD, {"text": "without the field"})
    with pytest.raises(DataError, match=r"1 records have no group \(t\.jsonl#1\)"):
        opened(
            tmp_path, GOOD | {"group": "g"}, GOOD | {"group": label if isinstance(label, str) else None}, group="group"
        )


@pytest.mark.parametrize("item", [None, " ", float("nan")])
def test_lists_hold_something_in_every_place(tmp_path: Path, item: object) -> None:
    good = 0.5 if isinstance(item, float) else "x"
    source = opened(tmp_path, GOOD | {"label": [good]}, GOOD | {"label": []}, GOOD | {"label": [good, item]})
    assert source.row(1).targets["label"] == []
    with pytest.raises(DataError, match=r"t\.jsonl#2: the label is .*; expected texts or numbers; leave out what is"):
        source.row(2)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_without_labels(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": ["a", "b", "c"], "label": pa.array(["x", " ", None]).cast(kind)})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"2 records have no label \(t\.parquet#1, t\.parquet#2\)"):
        open_source(DataConfig(source="text", path=str(tmp_path / "t.parquet"), text="text", label="label"))


def test_a_field_of_two_types_is_named_with_its_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="field label mixes types, from record 2 on"):
        opened(tmp_path, GOOD, GOOD, GOOD | {"label": float("nan")})


def test_nul_and_numbers_beside_the_fields_are_no_fault(tmp_path: Path) -> None:
    source = opened(tmp_path, GOOD | {"text": "a\0b", "id": 2**80, "deep": [[[HALF]]], HALF: 1})
    assert source.content(0) == "a\0b"


def test_questions_whose_text_has_no_word_are_counted(tmp_path: Path) -> None:
    asked = [{"id": "x", "question": "which?", "answers": []}]
    paragraphs = [{"context": text, "qas": [one | {"id": text} for one in asked]} for text in ("a b", " ")]
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"title": f"t {HALF}", "paragraphs": paragraphs}]}))
    source = open_source(DataConfig(source="squad", path=str(tmp_path / "q.json")))
    assert len(source) == 1
    assert source.left_out() == {"questions on a text without a word": (1, "q.json# ")}
    (bad,) = key_contents(source, workers=1).bad
    assert bad.reason == "half of a character (a lone surrogate): the target group has it; mend it"
