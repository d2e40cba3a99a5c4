"""Contents without labels: what `recycle predict` reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import DataConfig, Source, open_source
from pipeline.errors import ConfigError, DataError

PIXELS = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
"""Three grey images of 3 x 3 pixels."""
RECORDS = [{"q": f"what {i}?", "a": f"that {i}.", "label": i % 2, "part": "train"} for i in range(3)]
TEXTS = {"source": "text", "path": "t.jsonl", "text": "q", "label": "label", "split": "part"}
PAIRS = {"source": "pairs", "path": "p.jsonl", "anchor": "q", "positive": "a", "split": "part"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(settings: dict[str, Any], path: str) -> Source:
    source = open_source(DataConfig(**settings).of_inputs(path))
    assert not any("label" in source.row(i).targets for i in range(len(source)))
    assert all(source.row(i).split is None for i in range(len(source)))
    return source


def contents(source: Source) -> list[Any]:
    return [source.content(i) for i in range(len(source))]


def write_lines(path: str, *fields: str) -> None:
    Path(path).write_text("".join(json.dumps({name: record[name] for name in fields}) + "\n" for record in RECORDS))


def write_table(path: str, rows: np.ndarray, header: str = "") -> None:
    Path(path).write_text(header + "\n".join(",".join(map(str, row.ravel().tolist())) for row in rows))


def test_files_lie_in_any_folders() -> None:
    names = ["b.png", "train/a.png", "c/d/e.PNG"]
    for number, name in enumerate(names):
        Path("new", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(Path("new", name), "PNG")
    Path("new/notes.txt").write_text("no image")
    source = opened({"source": "images", "path": "photos"}, "new")
    assert [source.row(i).source for i in range(3)] == ["b.png", "c/d/e.PNG", "train/a.png"]
    assert source.content(0) == Path("new/b.png").read_bytes()
    assert source.stamp(0) is not None
    table = {"source": "images", "path": "t.jsonl", "image": "file", "label": "kind"}
    assert contents(opened(table, "new")) == contents(source)
    Path("new.jsonl").write_text("".join(json.dumps({"file": f"new/{name}"}) + "\n" for name in names))
    assert sorted(contents(opened(table, "new.jsonl"))) == sorted(contents(source))
    with pytest.raises(DataError, match=r"holds no sounds \(.*\)$"):
        opened({"source": "audio", "path": "sounds"}, "new")


@pytest.mark.parametrize("fields", [("q",), ("q", "label"), ("q", "part")])
def test_texts_need_no_labels(fields: tuple[str, ...]) -> None:
    write_lines("new.jsonl", *fields)
    assert contents(opened(TEXTS, "new.jsonl")) == ["what 0?", "what 1?", "what 2?"]


def test_texts_need_their_text() -> None:
    write_lines("new.jsonl", "a")
    with pytest.raises(ConfigError, match=r"data\.text is 'q'; new\.jsonl has the fields a"):
        opened(TEXTS, "new.jsonl")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("q",), ["what 0?", "what 1?", "what 2?"]),
        (("a", "label"), ["that 0.", "that 1.", "that 2."]),
        (("q", "a"), ["what 0?", "that 0.", "what 1?", "that 1.", "what 2?", "that 2."]),
    ],
)
def test_one_half_of_pairs_is_enough(fields: tuple[str, ...], expected: list[str]) -> None:
    write_lines("new.jsonl", *fields)
    assert contents(opened(PAIRS, "new.jsonl")) == expected


def test_pairs_need_a_half() -> None:
    write_lines("new.jsonl", "label")
    with pytest.raises(ConfigError, match=r"data\.anchor is 'q'; new\.jsonl has the fields label"):
        opened(PAIRS, "new.jsonl")


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    ("settings", "header"),
    [({}, ""), ({"shape": [3, 3]}, ""), ({"label": "digit"}, "abcdefghi"), ({"label": 0}, "")],
    ids=str,
)
def test_tables_of_pixels(settings: dict[str, Any], header: str, labels: bool) -> None:
    first = settings.get("label") == 0
    flat = PIXELS.reshape(3, 9)
    rows = np.insert(flat, 0 if first else 9, 7, axis=1) if labels else flat
    named = ",".join([*header, *(["digit"] if labels else [])]) + "\n" if header else ""
    write_table("new.csv", rows, named)
    source = opened({"source": "pixels", "path": "p.csv"} | settings, "new.csv")
    assert np.array_equal(np.stack(contents(source)), PIXELS)


def test_arrays() -> None:
    np.save("new.npy", PIXELS)
    np.savez("one.npz", x=PIXELS)
    np.savez("two.npz", x=PIXELS, y=[1, 2, 3])
    settings = {"source": "arrays", "path": "p.npy"}
    for path in ("new.npy", "one.npz", "two.npz"):
        assert np.array_equal(np.stack(contents(opened(settings, path))), PIXELS)
    np.save("flat.npy", np.arange(3))
    with pytest.raises(DataError, match=r"samples int64 of shape \(3,\)"):
        opened(settings, "flat.npy")


def test_words_need_no_tags() -> None:
    Path("bare.conll").write_text("# a comment\none\n#\n\ntwo\n")
    Path("tagged.conll").write_text("one X B-a\n# X O\n\ntwo X O\n")
    settings = {"source": "conll", "path": "t.conll"}
    for path in ("bare.conll", "tagged.conll"):
        assert contents(opened(settings, path)) == [["one", "#"], ["two"]]
    Path("new.jsonl").write_text(json.dumps({"words": ["one", "two"]}))
    table = {"source": "tagged", "path": "t.jsonl", "words": "words", "tags": "tags", "split": "part"}
    assert contents(opened(table, "new.jsonl")) == [["one", "two"]]


def test_questions_need_no_answers() -> None:
    paragraph = {"context": "one two", "qas": [{"id": "a", "question": "which?"}]}
    Path("new.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    source = opened({"source": "squad", "path": "train.json"}, "new.json")
    assert contents(source) == [("which?", "one two")]
    assert source.row(0).targets["window"] == "one two"


def test_the_digest_is_of_the_labelled_file() -> None:
    write_lines("new.jsonl", "q")
    assert len(opened(TEXTS | {"sha256": "0" * 64}, "new.jsonl")) == 3


def test_training_may_do_without_labels_in_its_settings() -> None:
    write_lines("t.jsonl", "q")
    unlabelled = DataConfig(source="text", path="t.jsonl", text="q", labelled=False)
    assert len(open_source(unlabelled)) == 3
