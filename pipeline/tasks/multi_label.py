"""Any number of labels for each sample: binary cross entropy, average precision."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tasks.base import Column, Kind, PredictionContext, Table, column, refuse_unseen
from pipeline.tasks.classification import OfClasses
from pipeline.tasks.config import SCORES
from pipeline.tasks.review import Mistake, class_scores, reliability, review, worst
from pipeline.tasks.scores import ALONE, Metrics, read_tensor

# N row of the table, B batch, C class

GIVEN = 0.5
"""Probability above which a sample is given one of any number of labels, as the scores have it."""


class MultiLabel(OfClasses):
    """Any number of labels for each sample, or none."""

    name = "multi-label"
    problem = "multi_label_classification"

    def classes(self, table: Table) -> list[Any]:
        training = self._lists(table)[table.split == "train"].tolist()
        found = {label for labels in training for label in labels}
        kinds = {type(label).__name__ for label in found}
        if not kinds <= {"str"} and not kinds <= {"int"}:
            raise DataError(f"the labels are {', '.join(sorted(kinds))}; multi-label needs names, or whole numbers")
        if len(found) < 2:
            raise DataError(
                f"the training split has {len(found)} labels ({sorted(found)}); multi-label needs two or more; of one "
                "make yes and no, and set task.kind: classification"
            )
        return sorted(found)

    def _lists(self, table: Table) -> np.ndarray:
        labels = column(table, "label", self.name)
        if labels.dtype != object:
            raise DataError(
                f"the labels are {labels.dtype}, one per sample; multi-label needs lists: set data.delimiter "
                "where one text holds several, or task.kind: classification"
            )
        return labels

    def prepare(self, table: Table) -> dict[str, np.ndarray]:
        lists, classes = self._lists(table).tolist(), self.classes(table)
        numbers = {label: number for number, label in enumerate(classes)}
        unseen = [label for labels in lists for label in set(labels) if label not in numbers]
        refuse_unseen(set(unseen), "labels", f"{len(unseen)} held-out samples")
        hot_NC = np.zeros((len(lists), len(classes)), np.uint8)
        for row, labels in enumerate(lists):
            hot_NC[row, [numbers[label] for label in labels]] = 1
        if self.balanced:
            hot = hot_NC[table.split == "train"]
            positive = hot.sum(0, dtype=np.int64)
            self._weights = torch.from_numpy(np.maximum(len(hot) - positive, 1) / positive).float()
        return {"label": hot_NC}

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        logits_BC, hot_BC = read_tensor(output).float(), targets["label"].float()
        smooth_BC = hot_BC * (1 - self.label_smoothing) + self.label_smoothing / 2
        weights = None if self._weights is None else self._weights.to(logits_BC.device)
        return F.binary_cross_entropy_with_logits(logits_BC, smooth_BC, pos_weight=weights)

    def linear_target(self, targets: Mapping[str, Tensor]) -> Tensor:
        return 2.0 * targets["label"] - 1

    def metrics(self) -> Metrics:
        return MultiLabelScores(SCORES[self.name])

    def review(self, table: Table) -> Metrics:
        return MultiLabelReview(list(map(str, self.classes(table))))

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"labels": [type(legend[0])], "probabilities": {str(label): float for label in legend}}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        probabilities_BC = read_tensor(output).float().sigmoid().cpu().numpy()
        given = [[legend[number] for number in np.flatnonzero(one > GIVEN).tolist()] for one in probabilities_BC]
        return {"labels": given, "probabilities": probabilities_BC}


class MultiLabelScores(Metrics):
    """`average_precision`, `micro_f1` and `macro_f1`, in 0..1; a label is given where its probability exceeds a half.

    Average precision is the mean over the labels that some sample has, macro F1 over those that some sample has or was
    given.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.scores = dict[str, Any]()

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        self.scores = self.scores or _label_scores(output.shape[1])
        for score in self.scores.values():
            score.update(output.sigmoid(), targets["label"].long())

    def result(self) -> dict[str, float]:
        _, false_positives_C, _, _, support_C = self.scores["counts"].compute().T
        there_C = support_C > 0
        said_C = there_C | (false_positives_C > 0)
        with warnings.catch_warnings(
            action="ignore", category=UserWarning
        ):  # on labels that no sample has: they are left out here
            precision_C = self.scores["precision"].compute()
        return {
            "average_precision": float(precision_C[there_C].mean()),
            "micro_f1": float(self.scores["micro"].compute()) if said_C.any() else float("nan"),
            "macro_f1": float(self.scores["each"].compute()[said_C].mean()),
        }


class MultiLabelReview(Metrics):
    """Scores by label, and the samples with the label that is furthest from right."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(())
        self._classes = np.array(classes)
        self._seen: list[tuple[Tensor, ...]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._seen.append((targets["row"], targets["label"], output.sigmoid()))

    def result(self) -> dict[str, Any]:
        rows, label_NC, probability_NC = (torch.cat(part).numpy() for part in zip(*self._seen, strict=True))
        right_NC, found_NC = label_NC > 0, probability_NC > GIVEN
        is_wrong_N = (right_NC != found_NC).any(axis=1)
        furthest_N = np.abs(probability_NC - right_NC).max(axis=1)

        def named(chosen_C: np.ndarray) -> str:
            return ", ".join(self._classes[chosen_C]) or "no label"

        mistakes = [
            Mistake(int(rows[i]), named(right_NC[i]), named(found_NC[i]), float(furthest_N[i]))
            for i in worst(furthest_N, is_wrong_N)
        ]
        return review(
            len(rows),
            int(is_wrong_N.sum()),
            mistakes,
            "largest error of a label's probability",
            classes=class_scores(
                self._classes.tolist(), *(one.sum(axis=0) for one in (right_NC & found_NC, right_NC, found_NC))
            ),
            reliability=reliability(probability_NC.ravel(), right_NC.ravel()),
        )


def _label_scores(labels: int) -> dict[str, Any]:
    from torchmetrics import classification as library  # noqa: PLC0415  (slow to import)

    return {
        "precision": library.MultilabelAveragePrecision(labels, average="none", **ALONE),
        "micro": library.MultilabelF1Score(labels, average="micro", **ALONE),
        "each": library.MultilabelF1Score(labels, average="none", **ALONE),
        "counts": library.MultilabelStatScores(labels, average="none", **ALONE),
    }
