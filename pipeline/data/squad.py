"""Questions on paragraphs, in overlapping windows of words, whose answers are spans: SQuAD's JSON 1.1 and 2.0."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.config import DataConfig
from pipeline.data.formats import parse
from pipeline.data.records import read_text
from pipeline.data.source import LeftOut, Row, Source, Target
from pipeline.data.walk import files_by_split
from pipeline.errors import BadSampleError, DataError

WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Question:
    """A question on a paragraph."""

    name: str
    text: str
    context: str
    article: str
    split: str | None
    answers: Sequence[tuple[int, str]]
    """Where each right answer begins in the context, and what it is; none where the context has none."""


class Questions(Source):
    """A row per window of a question's context; its content is (question, window).

    Targets: `question` (its id), `window` (the text), `answers` (all right ones), `start` and `end` of the first one in
    the window, in characters, -1 if there is none; and `group`, the article, because whole articles are held out.
    """

    def __init__(self, name: str, questions: Sequence[Question], window: int, overlap: int, left_out: LeftOut) -> None:
        self.name, self._questions, self._left_out = name, questions, left_out
        self._rows: list[tuple[int, int, int]] = []
        for number, question in enumerate(questions):
            rows = [(number, begin, end) for begin, end in windows(question.context, window, overlap)]
            self._rows += rows
            if not rows:
                left_out.add("questions on a text without a word", f"{name}#{question.name}")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Row:
        number, begin, end = self._rows[i]
        question = self._questions[number]
        start, stop = _first_inside(question.answers, begin, end)
        targets: dict[str, Target] = {
            "question": question.name,
            "window": question.context[begin:end],
            "answers": [answer for _, answer in question.answers],
            "start": start,
            "end": stop,
            "group": question.article,
        }
        return Row(f"{self.name}#{question.name}@{begin}", question.split, targets)

    def content(self, i: int) -> tuple[str, str]:
        number, begin, end = self._rows[i]
        question = self._questions[number]
        for start, answer in question.answers:
            found = question.context[start : start + len(answer)]
            if found != answer:
                raise BadSampleError(
                    f"a wrong answer_start: question {question.name} gives {start} for {answer!r}; the context has "
                    f"{found!r} there"
                )
        if not question.text.strip():
            raise BadSampleError(f"no text: question {question.name} is empty")
        return question.text, question.context[begin:end]


def open_squad(config: DataConfig, path: Path) -> Questions:
    """Read a file of articles, or a file per split."""
    left_out = LeftOut()
    parts = files_by_split(path, left_out)
    found = [question for file, split in parts for question in _read(file, split if config.labelled else None, config)]
    if not found:
        raise DataError(f"data.path {path} holds no questions")
    names = set[str]()
    for question in found:
        if question.name in names:
            raise DataError(f"data.path {path}: two questions have the id {question.name!r}; give each its own")
        names.add(question.name)
    return Questions(path.name, found, config.window, config.overlap, left_out)


def windows(text: str, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return begin and end, in characters, of windows of at most `size` words, sharing `overlap`, that cover `text`."""
    words = [found.span() for found in WORD.finditer(text)]
    firsts = range(0, max(len(words) - overlap, min(1, len(words))), size - overlap)
    return [(words[first][0], words[min(first + size, len(words)) - 1][1]) for first in firsts]


def _first_inside(answers: Sequence[tuple[int, str]], begin: int, end: int) -> tuple[int, int]:
    """Return begin and end, in the window, of the first answer inside it without the space around; else (-1, -1)."""
    for start, answer in answers:
        first = start + len(answer) - len(answer.lstrip())
        last = start + len(answer.rstrip())
        if begin <= first < last <= end:
            return first - begin, last - begin
    return -1, -1


def _read(path: Path, split: str | None, config: DataConfig) -> Iterator[Question]:
    loaded = parse(read_text(path, "JSON"), f"data.path {path} cannot be read as JSON")
    for a, article in enumerate(_get(loaded, "data", list, str(path))):
        where = f"{path}: article {a}"
        title = _get(article, "title", str, where, default=f"article {a}")
        for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
            place = f"{where} ({title}), paragraph {p}"
            context = _get(paragraph, "context", str, place)
            for q, question in enumerate(_get(paragraph, "qas", list, place)):
                here = f"{place}, question {q}"
                right = _get(question, "answers", list, here) if config.labelled else []
                answers = [(_get(one, "answer_start", int, here), _get(one, "text", str, here)) for one in right]
                name, text = _get(question, "id", str, here), _get(question, "question", str, here)
                yield Question(name, text, context, title, split, answers)


def _get(item: Any, name: str, kind: type, where: str, default: Any = None) -> Any:
    """Return a field of a JSON object; raises DataError if it is missing, or of another type."""
    value = item.get(name, default) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{where}: {name!r} is {str(value)[:40]!r}; expected {kind.__name__}, as SQuAD has it")
    return value
