"""A tag for every word: cross entropy on the words' first tokens; precision, recall and F1 of whole entities."""

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tasks.base import (
    IGNORED,
    Column,
    Head,
    Kind,
    PredictionContext,
    Ragged,
    Table,
    Task,
    column,
    refuse_unseen,
)
from pipeline.tasks.config import SCORES, TaskConfig
from pipeline.tasks.review import Mark, Mistake, class_scores, confusion, reliability, review
from pipeline.tasks.scores import Metrics, read_tensor

# B batch, T token, W word, C tag

OUTSIDE = "O"
IOB2 = re.compile(r"O|[BI]-(.+)")


class Tagging(Task):
    """Entities in sentences: `tags` has a tag in IOB2 per word: O, or B- or I- with a type that training has."""

    name = "tagging"

    def __init__(self, config: TaskConfig) -> None:
        self.label_smoothing = config.label_smoothing
        self.layers = config.layers
        self.monitor = config.monitor or SCORES[self.name][0]
        self._tags: list[str] = []

    def head(self, table: Table) -> Head:
        tags = self.tags(table)
        return Head("tokens", size=len(tags), layers=self.layers, labels=tuple(tags))

    def tags(self, table: Table) -> list[str]:
        """Return the tags in the order of the logits.

        Raises DataError if they are no lists in IOB2, training has no entity, or other splits have types that it lacks.
        """
        by_split: dict[bool, set[str]] = {True: set(), False: set()}
        tags = column(table, "tags", self.name)
        if tags.dtype != object:
            raise DataError(f"the target tags is {tags.dtype}; tagging needs a list of tags for every sample")
        for split, of_words in zip(table.split.tolist(), tags.tolist(), strict=True):
            by_split[split == "train"].update(of_words)
        types = {is_training: _types(found) for is_training, found in by_split.items()}
        if not types[True]:
            raise DataError("the training split has no entity, every word is tagged O; tagging needs some")
        refuse_unseen(types[False] - types[True], "types of entities")
        return [OUTSIDE, *(f"{place}-{kind}" for kind in sorted(types[True]) for place in "BI")]

    def prepare(self, table: Table) -> dict[str, Ragged]:
        self._tags = self.tags(table)
        numbers = {tag: number for number, tag in enumerate(self._tags)}
        return {"tags": Ragged.of([[numbers[tag] for tag in tags] for tags in table.targets["tags"].tolist()])}

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        logits_BTC, tags_BT = read_tensor(output).float(), at_tokens(targets)
        return F.cross_entropy(logits_BTC.transpose(1, 2), tags_BT, label_smoothing=self.label_smoothing)

    def linear_target(self, targets: Mapping[str, Tensor]) -> Tensor:
        return at_tokens(targets)

    def metrics(self) -> Metrics:
        return TaggingScores(self._tags)

    def review(self, table: Table) -> Metrics:
        return TaggingReview(self.tags(table))

    def legend(self, table: Table) -> list[Any]:
        return self.tags(table)

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"tags": [str]}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        """Return the tag of each word; those at the end of a text that was cut off have none."""
        word_BT = context.extras["word"].cpu()
        words_B = word_BT.amax(1) + 1
        best_BT = read_tensor(output).float().argmax(-1).cpu()
        best_BW = at_words(best_BT, word_BT, int(words_B.max()), list(legend).index(OUTSIDE))
        found = zip(best_BW.tolist(), words_B.tolist(), strict=True)
        return {"tags": [[legend[number] for number in numbers[:words]] for numbers, words in found]}


def at_tokens(targets: Mapping[str, Tensor]) -> Tensor:
    """Return the tag of each token, (B, T) int64: `IGNORED` but for the first token of each word."""
    word_BT, tags_BW = targets["word"], targets["tags"]
    return tags_BW.gather(1, word_BT.clamp(min=0)).masked_fill(word_BT < 0, IGNORED)


class TaggingScores(Metrics):
    """`f1`, `precision` and `recall` of entities, right where type and both ends are; `accuracy` of tags. All in 0..1.

    A word without tokens, at the truncated end of a long sentence, counts as tagged O.
    """

    def __init__(self, tags: list[str]) -> None:
        super().__init__(SCORES["tagging"])
        self.tags = tags
        self._right: list[list[str]] = []
        self._found: list[list[str]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        tags_BW = targets["tags"]
        found_BW = at_words(output.argmax(-1), targets["word"], tags_BW.shape[1], self.tags.index(OUTSIDE))
        for right_W, found_W in zip(tags_BW, found_BW, strict=True):
            there = right_W != IGNORED
            self._right.append([self.tags[number] for number in right_W[there].tolist()])
            self._found.append([self.tags[number] for number in found_W[there].tolist()])

    def result(self) -> dict[str, float]:
        from nervaluate import Evaluator  # noqa: PLC0415  (slow to import)

        strict = Evaluator(self._right, self._found, tags=sorted(_types(self.tags)), loader="list").evaluate()
        entities = strict["overall"]["strict"]
        scores = {name: float(getattr(entities, name)) for name in ("f1", "precision", "recall")}
        right, found = (list(chain.from_iterable(words)) for words in (self._right, self._found))
        return scores | {"accuracy": sum(map(operator.eq, right, found)) / len(right) if right else float("nan")}


class TaggingReview(TaggingScores):
    """Scores by type of entity, confusions of words, and the sentences with most entities missed or wrong."""

    def __init__(self, tags: list[str]) -> None:
        super().__init__(tags)
        self._rows: list[int] = []
        self._probability: list[Tensor] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        super().add(output, targets)
        self._rows += targets["row"].tolist()
        highest_BT, tags_BW = output.softmax(-1).amax(-1), targets["tags"]
        self._probability.append(at_words(highest_BT, targets["word"], tags_BW.shape[1], 1)[tags_BW != IGNORED])

    def result(self) -> dict[str, Any]:
        types, mistakes = sorted(_types(self.tags)), list[Mistake]()
        counts = {kind: np.zeros(len(types), np.int64) for kind in ("hits", "expected", "found")}
        for row, right, found in zip(self._rows, self._right, self._found, strict=True):
            expected, predicted = set(entities(right)), set(entities(found))
            for kind, those in zip(counts, (expected & predicted, expected, predicted), strict=True):
                np.add.at(counts[kind], [types.index(of) for _, _, of in those], 1)
            if wrong := expected ^ predicted:
                mistakes.append(_mistake(row, expected, predicted, len(wrong)))
        right_W, found_W = (
            np.array([self._type(tag, types) for tag in chain.from_iterable(words)], np.int64)
            for words in (self._right, self._found)
        )
        is_right_W = np.fromiter(
            map(operator.eq, chain.from_iterable(self._right), chain.from_iterable(self._found)), bool
        )
        return review(
            len(self._rows),
            len(mistakes),
            mistakes,
            "entities missed or wrong",
            unit="sentences",
            confusion=confusion(right_W, found_W, [OUTSIDE, *types]) | {"unit": "words"},
            classes=class_scores(types, *counts.values()),
            reliability=reliability(torch.cat(self._probability).numpy(), is_right_W),
        )

    @staticmethod
    def _type(tag: str, types: list[str]) -> int:
        return 0 if tag == OUTSIDE else 1 + types.index(tag[2:])


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return the first word of each entity, the word after its last, and its type; a stray I- begins one, too."""
    found: list[tuple[int, int, str]] = []
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        kind = tag[2:]
        if tag[0] == "I" and found and found[-1][1:] == (place, kind):
            found[-1] = (found[-1][0], place + 1, kind)
        else:
            found.append((place, place + 1, kind))
    return found


def _mistake(
    row: int, expected: set[tuple[int, int, str]], predicted: set[tuple[int, int, str]], wrong: int
) -> Mistake:
    marks = [
        *(Mark(begin, end, "right", kind) for begin, end, kind in expected & predicted),
        *(Mark(begin, end, "missed", kind) for begin, end, kind in expected - predicted),
        *(Mark(begin, end, "wrong", kind) for begin, end, kind in predicted - expected),
    ]
    marks.sort(key=lambda mark: (mark.begin, mark.end, mark.kind))
    return Mistake(row, _counted(expected), _counted(predicted), float(wrong), marks)


def _counted(those: Collection[object]) -> str:
    return f"{len(those)} {'entity' if len(those) == 1 else 'entities'}"


def at_words(values_BT: Tensor, word_BT: Tensor, words: int, absent: int) -> Tensor:
    """Return the values at the first token of each word, (B, W); `absent` for a word without tokens."""
    values_BW = torch.full((len(values_BT), words + 1), absent, dtype=values_BT.dtype)
    return values_BW.scatter(1, word_BT.masked_fill(word_BT < 0, words), values_BT)[:, :words]


def _types(tags: set[str] | list[str]) -> set[str]:
    """Return the types of entities that tags in IOB2 name."""
    types = set()
    for tag in tags:
        if (known := IOB2.fullmatch(str(tag))) is None:
            raise DataError(f"the tag {tag!r} is not in IOB2; expected O, B-TYPE or I-TYPE, as source conll gives them")
        if known[1] is not None:
            types.add(known[1])
    return types
