"""What a look at a file or folder proposes: source, fields, task; and that the proposal reads it."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import tiny

from pipeline.data import DataConfig, open_source, propose
from pipeline.errors import ConfigError

WORDS = "one two three four five six seven"


def texts(count: int = 60, **fields: Sequence[Any]) -> list[dict[str, Any]]:
    """Records with a text each, and other fields whose values are repeated."""
    return [
        {"text": f"{WORDS} number {i}"} | {name: values[i % len(values)] for name, values in fields.items()}
        for i in range(count)
    ]


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def as_lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def pairs(**names: str) -> list[dict[str, str]]:
    return [{name: f"{text} {WORDS} number {i}" for name, text in names.items()} for i in range(30)]


SQUAD = {
    "version": "1.1",
    "data": [
        {"title": "a", "paragraphs": [{"context": "one two", "qas": [
            {"id": "1", "question": "what", "answers": [{"text": "two", "answer_start": 4}]}]}]}
    ],
}  # fmt: skip
CONLL = "one O\ntwo B-Disease\n\nthree O\nfour O\n"

CASES = {
    "names of classes": ("a.csv", as_csv(texts(label=["good", "bad"])), "text", "classification", {"text": "text"}),
    "numbers of classes": ("a.csv", as_csv(texts(stars=[1, 2, 3])), "text", "classification", {"label": "stars"}),
    "numbers": ("a.csv", as_csv(texts(price=np.linspace(0, 9, 60).tolist())), "text", "regression", {"label": "price"}),
    "whole numbers": ("a.tsv", as_csv(texts(label=list(range(60)))).replace(",", "\t"), "text", "regression", {}),
    "a split": ("a.jsonl", as_lines(texts(intent=["a", "b"], part=["train", "dev", "test"])), "text",
                "classification", {"label": "intent", "split": "part"}),
    "several labels in one field": ("a.csv", as_csv(texts(topics=["a|b", "b", "c|a"])), "text", "multi-label",
                                    {"label": "topics", "delimiter": "|"}),
    "lists of labels": ("a.jsonl", as_lines(texts(labels=[["a"], ["a", "b"], []])), "text", "multi-label", {}),
    "two texts and a label": ("a.csv", as_csv([one | {"label": str(i % 3)} for i, one in
                              enumerate(pairs(premise="a", hypothesis="b"))]), "text", "classification",
                              {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
    "questions and answers": ("a.jsonl", as_lines(pairs(answer="b", question="a")), "pairs", "similarity",
                              {"anchor": "question", "positive": "answer"}),
    "names in another case": ("a.jsonl", as_lines(pairs(Question="a", Answer="b")), "pairs", "similarity",
                              {"anchor": "Question", "positive": "Answer"}),
    "words and tags": ("a.jsonl", as_lines([{"tokens": ["one", "two"], "ner": ["O", "B-X"]}] * 9), "tagged", "tagging",
                       {"words": "tokens", "tags": "ner"}),
    "chats": ("a.jsonl", as_lines([{"messages": [{"role": "user", "content": "hi"}], "id": 3}] * 9), "chat", "lm",
              {"messages": "messages"}),
    "prompts and completions": ("a.jsonl", as_lines(pairs(prompt="a", completion="b")), "completions", "lm",
                                {"prompt": "prompt", "completion": "completion"}),
    "CoNLL": ("a.conll", CONLL * 9, "conll", "tagging", {}),
    "CoNLL with tabs": ("a.tsv", CONLL.replace(" ", "\t") * 9, "conll", "tagging", {}),
    "SQuAD": ("a.json", json.dumps(SQUAD), "squad", "answers", {}),
    "pixels, label last": ("a.csv", as_csv([{f"p{n}": 7 * n % 256 for n in range(64)} | {"y": i % 4}
                           for i in range(20)]), "pixels", "classification", {"label": -1}),
    "pixels, label first, without a header": ("a.csv", "".join(f"{i % 4},{','.join(['0', '255'] * 32)}\n"
                                              for i in range(20)), "pixels", "classification", {"label": 0}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "source", "task", "fields"), CASES.values(), ids=list(CASES))
def test_a_file(tmp_path: Path, name: str, text: str, source: str, task: str, fields: dict[str, Any]) -> None:
    path = tmp_path / name
    path.write_text(text)
    proposal = propose(path)
    assert (proposal.settings["source"], proposal.task) == (source, task)
    assert fields.items() <= proposal.settings.items()
    assert len(open_source(DataConfig(**proposal.settings)))


def test_a_file_per_split(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(as_lines(texts(label=["a", "b"])))
    proposal = propose(tmp_path)
    assert proposal.settings == {"source": "text", "path": str(tmp_path), "text": "text", "label": "label"}
    assert {open_source(DataConfig(**proposal.settings)).row(i).split for i in (0, 60, 120)} == {
        "train", "validation", "test"
    }  # fmt: skip


def test_the_only_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").write_text(as_lines(pairs(question="a", answer="b")))
    assert propose(tmp_path).settings["path"] == str(tmp_path / "faq.jsonl")


def test_a_parquet_file_and_a_saved_data_set_give_names_of_classes(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(texts(label=["a", "b"])), tmp_path / "a.parquet")
    assert propose(tmp_path / "a.parquet").task == "classification"
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.Dataset.from_list(texts(label=[0, 1]), features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert propose(tmp_path / "saved").settings["label"] == "label"


@pytest.mark.parametrize("splits", [(".",), ("train", "test")])
def test_folders_of_classes(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        tiny.write_images(tmp_path / split, range(2))
    proposal = propose(tmp_path)
    assert (proposal.settings, proposal.task) == ({"source": "images", "path": str(tmp_path)}, "classification")


def test_a_table_beside_images_names_them(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "all", range(4))
    files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.png"))
    records = [{"file": file, "kind": file.split("/")[1], "note": "x"} for file in files]
    (tmp_path / "labels.csv").write_text(as_csv(records))
    proposal = propose(tmp_path)
    assert proposal.settings["image"] == "file"
    assert proposal.settings["label"] == "kind"
    assert proposal.unused == ["note"]


@pytest.mark.parametrize(("name", "text"), [("notes.csv", "a,b\n1,\n2,\n"), ("classes.json", '{"0": "circle"}')])
def test_a_table_of_something_else_beside_folders_of_classes(tmp_path: Path, name: str, text: str) -> None:
    tiny.write_images(tmp_path, range(2))
    (tmp_path / name).write_text(text)
    assert propose(tmp_path).settings == {"source": "images", "path": str(tmp_path)}


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    for name in ("high", "low"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "1.wav", np.zeros(800, np.float32), 8000)
    assert propose(tmp_path).settings["source"] == "audio"


def test_long_texts_are_measured(tmp_path: Path) -> None:
    records = texts(label=["a", "b"])
    (tmp_path / "a.jsonl").write_text(as_lines([*records, {"text": "word " * 500, "label": "a"}]))
    assert propose(tmp_path / "a.jsonl").words == 9, "one long text among 61 decides nothing"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.csv": as_csv(texts(label=["same"]))}, "has the fields text, label; none of them looks like"),
        ({"a.txt": "just a text"}, "is no table"),
        ({"a.txt": "one", "b.txt": "two"}, "it has 2 .txt; name one file"),
        ({}, "it has no files"),
    ],
)
def test_what_is_not_recognised_says_what_is_there(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        propose(tmp_path)


def test_images_without_classes_are_explained(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(tiny.draw(0, 0))
    with pytest.raises(ConfigError, match=r"train/cat/1\.jpg.*or add a table"):
        propose(tmp_path)
