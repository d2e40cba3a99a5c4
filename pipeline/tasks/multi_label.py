"""Any number of labels per sample: binary cross entropy for each, F1 and average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score, MultilabelStatScores

from pipeline.errors import DataError
from pipeline.tasks.base import Column, Kind, PredictionContext
from pipeline.tasks.classification import OfClasses
from pipeline.tasks.config import SCORES
from pipeline.tasks.scores import ALONE, Metrics, Scores, read_tensor, without_advice
from pipeline.tasks.targets import Table, column, refuse_unseen

# B batch, C class

GIVEN = 0.5
"""Probability above which a sample is given a label, as the scores have it."""


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

    def metrics(self) -> Metrics:
        return MultiLabelScores()

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"labels": [type(legend[0])], "probabilities": {str(label): float for label in legend}}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        probabilities_BC = read_tensor(output).float().sigmoid().cpu().numpy()
        given = [[legend[number] for number in np.flatnonzero(one > GIVEN).tolist()] for one in probabilities_BC]
        return {"labels": given, "probabilities": probabilities_BC}


class MultiLabelScores(Scores):
    """`average_precision`, `micro_f1` and `macro_f1`, in 0..1; a label is given where its probability exceeds a half.

    Average precision is the mean over the labels that some sample has, macro F1 over those that some sample has or was
    given.
    """

    def __init__(self) -> None:
        super().__init__(SCORES["multi-label"])
        self._scores: dict[str, Any] = {}

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        if not self._scores:
            classes = output.shape[1]
            self._scores = {
                "precision": MultilabelAveragePrecision(classes, average="none", **ALONE),
                "micro": MultilabelF1Score(classes, average="micro", **ALONE),
                "each": MultilabelF1Score(classes, average="none", **ALONE),
                "counts": MultilabelStatScores(classes, average="none", **ALONE),
            }
        for score in self._scores.values():
            score.update(output.sigmoid(), targets["label"].long())

    def result(self) -> dict[str, float]:
        _, false_positives_C, _, _, support_C = self._scores["counts"].compute().T
        there_C = support_C > 0
        said_C = there_C | (false_positives_C > 0)
        with without_advice():  # on labels that no sample has: they are left out here
            precision_C = self._scores["precision"].compute()
        return {
            "average_precision": float(precision_C[there_C].mean()),
            "micro_f1": float(self._scores["micro"].compute()) if said_C.any() else float("nan"),
            "macro_f1": float(self._scores["each"].compute()[said_C].mean()),
        }
