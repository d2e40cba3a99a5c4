"""Answers that are spans of a text: cross entropy on start and end; exact match and F1 as in SQuAD."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tasks.base import Column, Head, Kind, PredictionContext, Table, Task, column
from pipeline.tasks.config import SCORES, TaskConfig
from pipeline.tasks.review import Mark, Mistake, review
from pipeline.tasks.scores import ALONE, Metrics, read_tensor

# B batch, T token, A tokens of an answer

NOWHERE = 0
"""Token for "no answer here": the first one, which is [CLS] in BERT-like networks."""


class Answers(Task):
    """Extractive question answering.

    A sample is a question with a window of a text. Its targets are `question` (a name that all its windows share),
    `window` (the text), `answers` (the right ones), and `start` and `end`, the characters of the first answer that is
    in the window; both are -1 if there is none, and the window learns "no answer here".
    """

    name = "answers"

    def __init__(self, config: TaskConfig) -> None:
        self.max_answer = config.max_answer
        self.monitor = config.monitor or SCORES[self.name][0]
        self._windows: tuple[list[str], list[str], list[list[str]]] = ([], [], [])
        self._may_be_none = False

    def head(self, table: Table) -> Head:
        return Head("span")

    def prepare(self, table: Table) -> dict[str, np.ndarray]:
        columns = {n: column(table, n, self.name) for n in ("window", "question", "answers", "start", "end")}
        if not (columns["start"][table.split == "train"] >= 0).any():
            raise DataError(
                "no window of the training split holds an answer; answers needs some: look at data.window, "
                "or set another data.seed or data.validation"
            )
        self._windows = (columns["window"].tolist(), columns["question"].tolist(), columns["answers"].tolist())
        # Test samples must not decide validation scores.
        self._may_be_none = not all(columns["answers"][table.split != "test"].tolist())
        return {"row": np.arange(len(table.split)), "start": columns["start"], "end": columns["end"]}

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        allowed_BT = targets["chars"][..., 0] >= 0  # tokens of the text, and `NOWHERE`
        allowed_BT[:, NOWHERE] = True
        logits_B2T = read_tensor(output).float().masked_fill(~allowed_BT[:, None], -torch.inf)
        places_B2 = at_tokens(targets["start"], targets["end"], targets["chars"])
        return F.cross_entropy(logits_B2T.transpose(1, 2), places_B2)

    def linear_target(self, targets: Mapping[str, Tensor]) -> Tensor:
        chars_BT2, places_B2 = targets["chars"], at_tokens(targets["start"], targets["end"], targets["chars"])
        hot_BT2 = F.one_hot(places_B2, chars_BT2.shape[1]).transpose(1, 2).float()
        hot_BT2[:, 1:][chars_BT2[:, 1:, 0] < 0] = torch.nan  # the first token stands for "no answer here"
        return hot_BT2

    def metrics(self) -> Metrics:
        return AnswerScores(*self._windows, self.max_answer, may_be_none=self._may_be_none)

    def review(self, table: Table) -> Metrics:
        spans = np.stack([table.targets["start"], table.targets["end"]], axis=1)
        return AnswerReview(spans, *self._windows, self.max_answer, may_be_none=self._may_be_none)

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"question": str, "answer": str, "start": int, "end": int, "margin": float}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        """Return the best answer in each window, its position, and its margin over "no answer here"."""
        found = best_answers(output, context.extras["chars"], self.max_answer)
        rows = context.look_up()
        windows = [str(row["window"]) for row in rows]
        return {
            "question": [str(row["question"]) for row in rows],
            "answer": [text[begin:end] for text, begin, end, _ in zip(windows, *found, strict=True)],
            "start": found[0],
            "end": found[1],
            "margin": found[2],
        }


class AnswerScores(Metrics):
    """`f1` (of words) and `exact_match` of the best answer to each question, means over questions, in 0..1.

    A window's best answer is the likeliest span of at most `max_answer` tokens; a question's is the one with the
    largest margin over "no answer here", or none if no margin is positive and it `may_be_none`.
    """

    def __init__(
        self,
        texts: Sequence[str],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        max_answer: int,
        *,
        may_be_none: bool,
    ) -> None:
        """Take in the targets of N windows: a text, its question, and the right answers, empty if there is none."""
        super().__init__(SCORES["answers"])
        self.texts, self.questions, self.answers, self.max_answer = texts, questions, answers, max_answer
        self._may_be_none = may_be_none
        self._best: dict[str, tuple[float, int, int, int]] = {}

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        found = best_answers(output, targets["chars"], self.max_answer)
        for row, begin, end, margin in zip(targets["row"].tolist(), *found, strict=True):
            question = self.questions[row]
            if question not in self._best or margin > self._best[question][0]:
                self._best[question] = (margin, row, begin, end)

    def text(self, question: str) -> str:
        """Return the answer to a question, empty if there is none."""
        margin, row, begin, end = self._best[question]
        return "" if self._may_be_none and margin <= 0 else self.texts[row][begin:end]

    def scores(self, questions: Iterable[str]) -> dict[str, float]:
        """Return the mean scores over some questions."""
        from torchmetrics.text import SQuAD  # noqa: PLC0415  (slow to import)

        found: list[Any] = []
        right: list[Any] = []
        for question in questions:
            found.append({"id": question, "prediction_text": self.text(question)})
            right.append({"id": question, "answers": {"text": list(self.answers[self._best[question][1]]) or [""]}})
        squad = SQuAD(**ALONE)
        squad.update(found, right)
        return {name: float(score) / 100 for name, score in squad.compute().items()}

    def result(self) -> dict[str, float]:
        return self.scores(self._best)


class AnswerReview(AnswerScores):
    """The questions whose answer shares fewest words with a right one, with both marked in the window."""

    def __init__(self, spans_N2: np.ndarray, *windows: Any, may_be_none: bool) -> None:
        """Take in what `AnswerScores` does, and the right spans of the windows, (N, 2), -1 where there is none."""
        super().__init__(*windows, may_be_none=may_be_none)
        self._spans = spans_N2

    def result(self) -> dict[str, Any]:
        scored = {question: self.scores([question])["f1"] for question in self._best}
        mistakes = [self._mistake(question, score) for question, score in scored.items() if score < 1]
        return review(len(scored), len(mistakes), mistakes, "1 - F1 of the answer's words", unit="questions")

    def _mistake(self, question: str, score: float) -> Mistake:
        _, row, found, until = self._best[question]
        text, (start, end) = self.text(question), self._spans[row].tolist()
        marks = [Mark(start, end, "missed")] if start >= 0 else []
        marks += [Mark(found, until, "wrong")] if text else []
        expected = " / ".join(dict.fromkeys(self.answers[row])) or "no answer"
        return Mistake(row, expected, text or "no answer", 1 - score, marks)


def at_tokens(start_B: Tensor, end_B: Tensor, chars_BT2: Tensor) -> Tensor:
    """Return the first and last token of the characters `start` to `end`, (B, 2); `NOWHERE` if some are missing."""
    begins_BT, ends_BT = chars_BT2.unbind(-1)
    first_B = (ends_BT > start_B[:, None]).int().argmax(1)
    before_end_BT = (begins_BT >= 0) & (begins_BT < end_B[:, None])
    last_B = begins_BT.shape[1] - 1 - before_end_BT.flip(1).int().argmax(1)
    is_whole_B = (start_B >= 0) & (ends_BT.gather(1, last_B[:, None])[:, 0] >= end_B)
    return torch.stack([first_B, last_B], dim=1).where(is_whole_B[:, None], NOWHERE)


def best_answers(output: Any, chars_BT2: Tensor, longest: int) -> tuple[list[int], list[int], list[float]]:
    """Return start and end of the best answer of each window, in characters, and its margin over `NOWHERE`."""
    logits_B2T, chars_BT2 = read_tensor(output).detach().float().cpu(), chars_BT2.cpu()
    scores_B, first_B, last_B = best_spans(logits_B2T, chars_BT2, longest)
    every = torch.arange(len(scores_B))
    begins_B, ends_B = chars_BT2[every, first_B, 0].clamp(min=0), chars_BT2[every, last_B, 1].clamp(min=0)
    return begins_B.tolist(), ends_B.tolist(), (scores_B - logits_B2T[:, :, NOWHERE].sum(1)).tolist()


def best_spans(logits_B2T: Tensor, chars_BT2: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best span of text of at most `longest` tokens: its logits' sum, its first and its last token, (B,)."""
    of_text_BT = chars_BT2[..., 0] >= 0
    first_BT, last_BT = logits_B2T.masked_fill(~of_text_BT[:, None], -torch.inf).unbind(1)
    last_BTA = F.pad(last_BT, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    scores_B, place_B = (first_BT[..., None] + last_BTA).flatten(1).max(1)
    first_B = place_B // longest
    return scores_B, first_B, first_B + place_B % longest
