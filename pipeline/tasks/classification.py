"""One label per sample: cross entropy, accuracy and macro-F1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from pipeline.errors import DataError
from pipeline.tasks.base import Column, Head, Kind, PredictionContext, Task
from pipeline.tasks.config import SCORES, TaskConfig
from pipeline.tasks.scores import ALONE, Metrics, Scores, read_tensor
from pipeline.tasks.targets import Table, column, refuse_unseen


class OfClasses(Task):
    """A task whose outputs are a logit for each class; classes are the labels of the training split, sorted."""

    problem: ClassVar[Literal["single_label_classification", "multi_label_classification"]]

    def __init__(self, config: TaskConfig) -> None:
        self.label_smoothing = config.label_smoothing
        self.balanced = config.class_weights == "balanced"
        self.monitor = config.monitor or SCORES[self.name][0]
        self._weights: Tensor | None = None

    def head(self, table: Table) -> Head:
        labels = tuple(map(str, self.classes(table)))
        return Head("classes", size=len(labels), labels=labels, problem=self.problem)

    @abstractmethod
    def classes(self, table: Table) -> list[Any]:
        """Return the labels in the order of the logits; raises DataError if they are fewer than two, or no classes."""

    def legend(self, table: Table) -> list[Any]:
        return self.classes(table)


class Classification(OfClasses):
    """Single-label classification."""

    name = "classification"
    problem = "single_label_classification"

    def classes(self, table: Table) -> list[Any]:
        labels = column(table, "label", self.name)
        if labels.dtype.kind == "f":
            raise DataError(
                f"the labels are {labels.dtype}; classification needs names or whole numbers; set task.kind: regression"
            )
        if labels.dtype == object:
            raise DataError("the labels are lists; classification needs one per sample; set task.kind: multi-label")
        classes: list[Any] = np.unique(labels[table.split == "train"]).tolist()
        if len(classes) < 2:
            raise DataError(f"the training split has {len(classes)} classes ({classes}); classification needs two")
        return classes

    def prepare(self, table: Table) -> dict[str, np.ndarray]:
        labels, classes = column(table, "label", self.name), np.array(self.classes(table))
        unseen = labels[~np.isin(labels, classes)].tolist()
        refuse_unseen(set(unseen), "labels", f"{len(unseen)} held-out samples")
        numbers = np.searchsorted(classes, labels).astype(np.int64)
        if self.balanced:
            counts = np.bincount(numbers[table.split == "train"], minlength=len(classes))
            self._weights = torch.from_numpy(counts.sum() / (len(classes) * counts)).float()
        return {"label": numbers}

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        logits_BC = read_tensor(output).float()
        weights = None if self._weights is None else self._weights.to(logits_BC.device)
        return F.cross_entropy(logits_BC, targets["label"], weight=weights, label_smoothing=self.label_smoothing)

    def metrics(self) -> Metrics:
        return ClassificationScores()

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        each: Kind = {str(label): float for label in legend}
        return {"label": type(legend[0]), "probability": float, "probabilities": each}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        probabilities_BC = read_tensor(output).float().softmax(-1).cpu()
        highest_B, number_B = probabilities_BC.max(-1)
        return {
            "label": np.array(legend)[number_B.numpy()],
            "probability": highest_B.numpy(),
            "probabilities": probabilities_BC.numpy(),
        }


class ClassificationScores(Scores):
    """`accuracy` and `macro_f1` (the mean of the classes' F1), both in 0..1."""

    def __init__(self) -> None:
        super().__init__(SCORES["classification"])
        self._scores: dict[str, MulticlassAccuracy | MulticlassF1Score] = {}

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        if not self._scores:
            classes = output.shape[1]
            self._scores = {
                "accuracy": MulticlassAccuracy(classes, average="micro", **ALONE),
                "macro_f1": MulticlassF1Score(classes, average="macro", **ALONE),
            }
        for score in self._scores.values():
            score.update(output, targets["label"])

    def result(self) -> dict[str, float]:
        return {name: float(score.compute()) for name, score in self._scores.items()}
