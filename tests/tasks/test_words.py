"""Tasks about words and spans: what every task promises, and where words and answers lie among the tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_contract import Rows, TaskContract
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.tasks import Ragged, Task, TaskConfig, open_task
from pipeline.tasks.answers import AnswerScores, at_tokens, best_spans
from pipeline.tasks.base import IGNORED
from pipeline.tasks.tagging import TaggingScores, at_words


def lists(rows: list[list[Any]]) -> np.ndarray:
    return np.fromiter(rows, object, len(rows))


def tagged(train: list[str], validation: list[str]) -> Rows:
    split = np.array(["train"] * len(train) + ["validation"] * len(validation))
    return Rows(split, {"tags": lists([tags.split() for tags in train + validation])})


TAGS = tagged(["O B-X", "B-X I-X O", "O", "B-Y O O O", "O", "I-Y"], ["B-X I-X I-X O B-Y", "O B-Y"])


class TestTagging(TaskContract):
    settings: Mapping[str, Any] = {"kind": "tagging"}
    table = TAGS

    def batch(self, task: Task, rows: np.ndarray) -> dict[str, Tensor]:
        """Every word has two tokens, after a first one that belongs to none."""
        targets = super().batch(task, rows)
        words = targets["tags"].shape[1]
        pairs = torch.stack([torch.arange(words), torch.full((words,), -1)], 1).flatten()
        word = torch.cat([torch.tensor([-1]), pairs]).repeat(len(rows), 1)
        lost = targets["tags"].gather(1, word.clamp(min=0)) == IGNORED
        return targets | {"word": word.masked_fill(lost, -1)}

    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
        tags = targets["tags"].clamp(min=0).gather(1, targets["word"].clamp(min=0))
        return 9 * nn.functional.one_hot(tags, 5).float()

    def sections(self, folder: Path) -> dict[str, dict[str, Any]]:
        table = self.table
        records = [
            {"words": ["one", "two", "three", "good", "bad"][: len(tags)], "tags": tags, "part": part}
            for tags, part in zip(table.targets["tags"], table.split.tolist(), strict=True)
        ]
        (folder / "tags.json").write_text(json.dumps(records))
        data = {"source": "tagged", "path": "tags.json", "words": "words", "tags": "tags", "split": "part"}
        return {"data": data, "model": {"backbone": "hf:bert"}}

    def test_tags_are_those_of_the_types_of_training(self, task: Task) -> None:
        assert task.head(self.table).size == 5
        assert task.tags(self.table) == ["O", "B-X", "I-X", "B-Y", "I-Y"]

    def test_other_tokens_of_a_word_do_not_count(self, task: Task) -> None:
        targets = self.batch(task, np.array([0, 1]))
        output = self.right(targets)
        other = torch.where(targets["word"][..., None] < 0, torch.randn_like(output) * 50, output)
        assert torch.equal(task.loss(other, targets), task.loss(output, targets))


class TestSmoothedTagging(TestTagging):
    settings: Mapping[str, Any] = {"kind": "tagging", "label_smoothing": 0.1, "monitor": "accuracy"}


def scores(right: list[str], found: list[str], lost: int = 0) -> dict[str, float]:
    """Scores of one token per word, of which the last `lost` have none."""
    tags = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    metrics = TaggingScores(tags)
    for one, other in zip(right, found, strict=True):
        numbers = [torch.tensor([[tags.index(tag) for tag in line.split()]]) for line in (one, other)]
        words = torch.arange(numbers[0].shape[1])[None]
        word = words.masked_fill(words >= words.shape[1] - lost, -1)
        metrics.update(nn.functional.one_hot(numbers[1], 5).float(), {"tags": numbers[0], "word": word})
    return metrics.compute()


def test_entities_count_whole() -> None:
    both = scores(["B-X I-X O B-Y", "O B-X"], ["B-X I-X O B-X", "O B-X"])
    assert both == pytest.approx({"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "accuracy": 5 / 6})
    assert scores(["B-X I-X O"], ["B-X O O"])["f1"] == 0
    assert scores(["B-X B-X"], ["B-X I-X"])["recall"] == 0
    assert scores(["B-X I-X"], ["I-X I-X"])["f1"] == 1
    assert scores(["B-X O B-Y"], ["B-X O O"]) == pytest.approx(
        {"f1": 2 / 3, "precision": 1, "recall": 0.5, "accuracy": 2 / 3}
    )
    assert scores(["O O"], ["O O"]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}


def test_a_word_that_is_cut_off_is_no_entity() -> None:
    assert scores(["B-X O B-Y"], ["B-X O B-Y"], lost=1) == scores(["B-X O B-Y"], ["B-X O O"])


def test_at_words() -> None:
    word = torch.tensor([[-1, 0, -1, 1, 2, -1], [-1, 0, 2, -1, -1, -1]])
    values = torch.arange(12).view(2, 6)
    assert at_words(values, word, 4, -5).tolist() == [[1, 3, 4, -5], [7, -5, 8, -5]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (tagged(["O", "O O"], ["O"]), "the training split has no entity"),
        (tagged(["B-X"], ["B-Y I-Z"]), r"held-out samples have 2 types of entities that training lacks \('Y', 'Z'\)"),
        (tagged(["B-X", "S-X"], ["O"]), "the tag 'S-X' is not in IOB2"),
        (Rows(np.array(["train"]), {"tags": np.array(["O"])}), "tagging needs a list of tags for every sample"),
        (Rows(np.array(["train"]), {"label": np.array(["O"])}), "task tagging needs the target tags"),
    ],
)
def test_tags_that_do_not_do(table: Rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_task(TaskConfig(kind="tagging")).head(table)


def test_ragged_rows_are_filled_up_to_the_longest_of_a_batch() -> None:
    ragged = Ragged.of([[1, 2, 3], [], [4], [5, 6]])
    assert len(ragged) == 4
    assert ragged[np.array([3, 1, 2])].tolist() == [[5, 6], [IGNORED] * 2, [4, IGNORED]]
    assert ragged[np.array([1])].shape == (1, 0)
    assert Ragged.of([])[np.array([], np.int64)].shape == (0, 0)


TEXT = "one two three four"
PLACES = [(0, 3), (4, 7), (8, 13), (14, 18)]


def asked(train: int, validation: int, *, answered: bool = True) -> Rows:
    """Questions on one text; the answer to question i is its word i, of every fourth there is none."""
    count = train + validation
    none = [not answered and i % 4 == 3 for i in range(count)]
    places = [(-1, -1) if none[i] else PLACES[i % 4] for i in range(count)]
    targets = {
        "question": np.array([f"q{i}" for i in range(count)]),
        "window": np.array([TEXT] * count),
        "answers": lists([[] if none[i] else [TEXT[slice(*places[i])]] for i in range(count)]),
        "start": np.array([start for start, _ in places]),
        "end": np.array([end for _, end in places]),
    }
    return Rows(np.array(["train"] * train + ["validation"] * validation), targets)


def chars(count: int, padding: int = 0) -> Tensor:
    """Where tokens lie: a special one, two of the question, the words, and some of padding."""
    return torch.tensor([(-1, -1)] * 3 + PLACES + [(-1, -1)] * (1 + padding)).repeat(count, 1, 1)


class TestAnswers(TaskContract):
    settings: Mapping[str, Any] = {"kind": "answers"}
    table = asked(8, 5)

    def batch(self, task: Task, rows: np.ndarray) -> dict[str, Tensor]:
        return super().batch(task, rows) | {"chars": chars(len(rows))}

    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
        places = at_tokens(targets["start"], targets["end"], targets["chars"])
        return 9 * nn.functional.one_hot(places, targets["chars"].shape[1]).float()

    def sections(self, folder: Path) -> dict[str, dict[str, Any]]:
        (folder / "squad").mkdir()
        for part in ("train", "dev"):
            questions = [
                {
                    "id": f"{part} {i}",
                    "question": f"{part} two {'one ' * i}",
                    "answers": [{"text": TEXT[slice(*PLACES[i % 4])], "answer_start": PLACES[i % 4][0]}],
                }
                for i in range(6)
            ]
            article = {"title": part, "paragraphs": [{"context": TEXT, "qas": questions}]}
            (folder / "squad" / f"{part}.json").write_text(json.dumps({"data": [article]}))
        return {"data": {"source": "squad", "path": "squad"}, "model": {"backbone": "hf:bert"}}

    def test_padding_and_the_question_do_not_count(self, task: Task) -> None:
        targets = self.batch(task, np.arange(4))
        output = torch.randn(4, 2, 8)
        more = nn.functional.pad(output, (0, 3), value=50.0)
        more[:, :, 1:3] = 50
        padded = targets | {"chars": chars(4, padding=3)}
        assert torch.isclose(task.loss(more, padded), task.loss(output, targets))
        assert torch.isfinite(task.loss(more, padded))


class TestAnswersThatMayBeMissing(TestAnswers):
    settings: Mapping[str, Any] = {"kind": "answers", "monitor": "exact_match", "max_answer": 2}
    table = asked(8, 5, answered=False)


def test_characters_become_tokens() -> None:
    given = [(0, 3), (4, 13), (0, 18), (5, 6), (-1, -1), (8, 19), (14, 18)]
    start, end = (torch.tensor(column) for column in zip(*given, strict=True))
    found = at_tokens(start, end, chars(len(given), padding=2)).tolist()
    assert found == [[3, 3], [4, 5], [3, 6], [4, 4], [0, 0], [0, 0], [6, 6]]


def test_best_spans_are_in_order_short_enough_and_of_the_text() -> None:
    logits = torch.zeros(3, 2, 8)
    logits[:, 0, 6], logits[:, 1, 3] = 5, 5  # the end before the start
    logits[0, 0, 4], logits[0, 1, 5] = 4, 4
    logits[1, :, 0] = 99
    logits[2, :, 1] = 99
    _, first, last = best_spans(logits, chars(3), 30)
    assert [first.tolist()[0], last.tolist()[0]] == [4, 5]
    assert ((first >= 3) & (last <= 6) & (first <= last)).all()
    best, first, last = best_spans(logits, chars(3), 1)
    assert torch.equal(first, last)
    assert best[0] == 5


def test_a_question_has_the_best_answer_of_its_windows() -> None:
    windows = (["one two three four"] * 3, ["a", "a", "b"], [["two"], ["two"], ["Three!"]])
    metrics = AnswerScores(*windows, 30, may_be_none=False)
    logits = torch.zeros(3, 2, 8)
    logits[0, :, 3] = 9  # "one", but "no answer here" has as much
    logits[0, :, 0] = 9
    logits[1, :, 4] = 2
    logits[2, :, 5] = 1
    metrics.update(logits, {"row": torch.arange(3), "chars": chars(3)})
    assert metrics.compute() == {"exact_match": 1.0, "f1": 1.0}


def test_no_answer_is_one_only_where_questions_have_none() -> None:
    logits = torch.zeros(2, 2, 8)
    logits[:, :, 0], logits[:, :, 4] = 5, 1
    for answers, exact in (([[], ["two"]], 0.5), ([["two"], ["two"]], 1.0)):
        metrics = AnswerScores([TEXT] * 2, ["a", "b"], answers, 30, may_be_none=not all(answers))
        metrics.update(logits, {"row": torch.arange(2), "chars": chars(2)})
        assert metrics.compute()["exact_match"] == exact


def test_a_text_that_is_cut_off_altogether_has_an_empty_answer() -> None:
    metrics = AnswerScores([TEXT], ["a"], [["two"]], 30, may_be_none=False)
    metrics.update(torch.zeros(1, 2, 4), {"row": torch.zeros(1, dtype=torch.int64), "chars": torch.full((1, 4, 2), -1)})
    assert metrics.compute() == {"exact_match": 0.0, "f1": 0.0}


def test_without_any_answer_in_training_there_is_nothing_to_learn() -> None:
    table = asked(4, 4)
    table.targets["start"][:4] = -1
    with pytest.raises(DataError, match="no window of the training split holds an answer"):
        open_task(TaskConfig(kind="answers")).prepare(table)


def test_settings_are_those_of_the_task() -> None:
    with pytest.raises(ValueError, match="max_answer is 5, which kind tagging does not use"):
        TaskConfig(kind="tagging", max_answer=5)
    with pytest.raises(ValueError, match="monitor is 'accuracy'; answers has f1, exact_match"):
        TaskConfig(kind="answers", monitor="accuracy")
