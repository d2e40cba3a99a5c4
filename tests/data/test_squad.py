"""Questions on paragraphs: windows of words, where answers lie in them, and what is refused or set aside."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_contract import SourceContract

from pipeline.data import DataConfig, Source, build, open_source
from pipeline.data.squad import windows
from pipeline.errors import BadSampleError, DataError
from pipeline.keys import content_key

CONTEXT = "It rained in Rome , and\nthe  sun shone in Oslo"


def question(name: str, *answers: str, context: str = CONTEXT, shift: int = 0) -> dict[str, Any]:
    found = [{"text": answer, "answer_start": context.index(answer) + shift} for answer in answers]
    return {"id": name, "question": f"{name}?", "answers": found}


def write(path: Path, *articles: list[dict[str, Any]], context: str = CONTEXT) -> Path:
    data = [{"title": f"t{a}", "paragraphs": [{"context": context, "qas": qas}]} for a, qas in enumerate(articles)]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def opened(path: Path, **settings: Any) -> Source:
    return open_source(DataConfig(source="squad", path=str(path), **settings))


class TestSquad(SourceContract):
    rows = 6

    def make(self, folder: Path) -> dict[str, Any]:
        path = write(
            folder / "asked.json", [question("q1", "Rome", "in Rome"), question("q2")], [question("q3", "Oslo")]
        )
        return {"source": "squad", "path": str(path), "window": 7, "overlap": 2}

    def test_windows_and_where_answers_lie_in_them(self, source: Source) -> None:
        assert [source.content(i) for i in range(2)] == [
            ("q1?", "It rained in Rome , and\nthe"),
            ("q1?", "and\nthe  sun shone in Oslo"),
        ]
        described = [source.row(i).targets for i in range(6)]
        assert [(row["start"], row["end"]) for row in described] == [(13, 17), *[(-1, -1)] * 4, (22, 26)]
        assert described[5]["window"][22:26] == "Oslo"
        assert [row["answers"] for row in described[::2]] == [["Rome", "in Rome"], [], ["Oslo"]]
        assert [row["question"] for row in described] == ["q1", "q1", "q2", "q2", "q3", "q3"]
        assert [row["group"] for row in described] == ["t0"] * 4 + ["t1"] * 2


@pytest.mark.parametrize(
    ("count", "size", "overlap"), [(1, 3, 0), (3, 3, 2), (10, 3, 1), (11, 4, 3), (7, 7, 0), (8, 7, 6)]
)
def test_windows_cover_all_words_and_share_some(count: int, size: int, overlap: int) -> None:
    text = "  " + " \n".join(f"w{i}" for i in range(count)) + " "
    found = [text[begin:end].split() for begin, end in windows(text, size, overlap)]
    assert found[0][0] == "w0"
    assert found[-1][-1] == f"w{count - 1}"
    assert all(len(words) == size for words in found[:-1])
    for before, after in itertools.pairwise(found):
        assert before[size - overlap :] == after[:overlap]
        assert not set(after) <= set(before)
    assert windows(" \n", size, overlap) == []


def test_space_around_an_answer_does_not_count(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.json", [question("q", " Rome ")]))
    assert source.content(0) == ("q?", CONTEXT)
    assert source.row(0).targets["window"][slice(13, 17)] == "Rome"
    assert (source.row(0).targets["start"], source.row(0).targets["end"]) == (13, 17)


def test_an_article_lies_on_one_side(tmp_path: Path) -> None:
    articles = [[question(f"q{a}-{q}", "Rome") for q in range(5)] for a in range(40)]
    source = opened(write(tmp_path / "a.json", *articles), window=5, overlap=1, validation=0.5)
    keys = np.stack([np.frombuffer(content_key(source.content(i)), np.uint8) for i in range(len(source))])
    table = build(source, keys, DataConfig(source="squad", path="x", validation=0.5))
    sides = {(group, split) for group, split in zip(table.targets["group"].tolist(), table.split.tolist(), strict=True)}
    assert len(sides) == 40
    assert 8 < len({group for group, split in sides if split == "validation"}) < 32


def test_a_wrong_place_of_an_answer_sets_its_question_aside(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.json", [question("q1", "Rome", shift=1), question("q2", "Oslo")]))
    with pytest.raises(BadSampleError, match="question q1 gives 14 for 'Rome'; the context has 'ome ' there"):
        source.content(0)
    assert source.content(1)[0] == "q2?"


def test_a_folder_has_a_file_per_split(tmp_path: Path) -> None:
    write(tmp_path / "train-v1.1.json", [question("q1", "Rome")])
    write(tmp_path / "dev-v1.1.json", [question("q2", "Oslo")])
    source = opened(tmp_path)
    assert [source.row(i).split for i in range(2)] == ["validation", "train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("data"), "'data' is 'None'; expected list"),
        (lambda d: d["data"][0].pop("paragraphs"), r"article 0: 'paragraphs' is 'None'; expected list"),
        (lambda d: d["data"][0]["paragraphs"][0].update(context=3), r"\(t0\), paragraph 0: 'context' is '3'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].pop("answers"), "question 0: 'answers' is 'None'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(id=7), "'id' is '7'; expected str"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"].append(question("q1")), "two questions have the id 'q1'"),
        (lambda d: d["data"].clear(), "holds no questions"),
    ],
)
def test_what_is_not_squad(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "a.json", [question("q1", "Rome")])
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))
    with pytest.raises(DataError, match=message):
        opened(path)


def test_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        opened(tmp_path / "a.json")
    with pytest.raises(ValueError, match="overlap is 20, window 10; make the overlap smaller"):
        DataConfig(source="squad", path="x", window=10, overlap=20)
