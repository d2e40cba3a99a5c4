"""One content under two labels, or in training and held out, is said; what is normal is not."""

import time
from typing import Any

import numpy as np
import pytest

from pipeline.data import SampleTable, remarks
from pipeline.keys import content_key


def table(rows: list[tuple[str, str]], **targets: list[Any]) -> SampleTable:
    """Rows of (content, split), called by their number."""
    keys = np.stack([np.frombuffer(content_key(content), np.uint8) for content, _ in rows])
    lists = {name for name, values in targets.items() if isinstance(values[0], list)}
    columns = {
        name: np.fromiter(values, object, len(values)) if name in lists else np.array(values)
        for name, values in targets.items()
    }
    return SampleTable(keys, np.array([split for _, split in rows]), [f"r{i}" for i in range(len(rows))], columns)


def in_train(contents: str) -> list[tuple[str, str]]:
    return [(content, "train") for content in contents]


@pytest.mark.parametrize(
    ("contents", "labels", "said"),
    [
        ("abc", ["x", "y", "x"], []),
        ("aba", ["x", "y", "x"], []),
        (
            "abac",
            ["x", "y", "z", "x"],
            ["2 samples have the content of another sample under another label, first: r0 = r2"],
        ),
        ("aab", [1, 2, 2], ["2 samples have the content of another sample under another label, first: r0 = r1"]),
        ("aab", [0.5, 0.5, 1.0], []),
        ("aabb", [["x", "y"], ["y", "x"], [], []], []),
        ("aab", [["x"], [], []], ["2 samples have the content of another sample under another label, first: r0 = r1"]),
        (
            "dcbadcbad",
            ["x"] * 4 + ["y"] * 5,
            ["9 samples have the content of another sample under another label, first: r0 = r4 = r8, r1 = r5, r2 = r6"],
        ),
    ],
)
def test_a_content_under_two_labels(contents: str, labels: list[Any], said: list[str]) -> None:
    assert remarks(table(in_train(contents), label=labels)) == said


def test_tags_are_in_order() -> None:
    assert remarks(table(in_train("aa"), tags=[["O", "B-x"], ["O", "B-x"]])) == []
    assert remarks(table(in_train("aa"), tags=[["O", "B-x"], ["B-x", "O"]])) == [
        "2 samples have the content of another sample under another tags, first: r0 = r1"
    ]


def test_a_content_in_train_and_held_out() -> None:
    rows = [("a", "train"), ("b", "train"), ("a", "validation"), ("c", "test"), ("b", "test"), ("a", "train")]
    assert remarks(table(rows, label=["x"] * 6)) == [
        "1 contents lie in train and in validation, first: r0 = r2 = r5",
        "1 contents lie in train and in test, first: r1 = r4",
    ]
    assert remarks(table([("a", "validation"), ("a", "validation")], label=["x", "x"])) == []


def test_of_pairs_whole_ones_count() -> None:
    contents = ["q", "a", "q", "b", "p", "a", "q", "a"]
    more: dict[str, Any] = {"pair": [0, 0, 1, 1, 2, 2, 3, 3], "role": ["anchor", "positive"] * 4}
    splits = ["train"] * 4 + ["validation"] * 2
    assert remarks(table(list(zip(contents[:6], splits, strict=True)), **{k: v[:6] for k, v in more.items()})) == []
    held_out = list(zip(contents, [*splits, "test", "test"], strict=True))
    assert remarks(table(held_out, **more)) == ["1 pairs lie in train and in test, first: r0 = r6"]
    assert remarks(table(in_train("".join(contents)), **more, belongs=[1, 1, 1, 1, 1, 1, 0, 0])) == [
        "2 pairs are another pair under another belongs, first: r0 = r6"
    ]


def test_a_hundred_thousand_rows_take_little() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (50_000, 16), np.uint8).repeat(2, axis=0)
    labels = np.arange(100_000).astype(str)
    empty = time.perf_counter()
    (said,) = remarks(SampleTable(keys, np.full(100_000, "train"), [str(i) for i in range(100_000)], {"label": labels}))
    assert time.perf_counter() - empty < 3
    assert said.startswith("100000 samples")
