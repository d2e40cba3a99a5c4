"""Labels of samples: one each (cross entropy, accuracy), or any number (binary cross entropy, average precision)."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tasks.base import Column, Head, Kind, PredictionContext, Table, Task, column, refuse_unseen
from pipeline.tasks.config import SCORES, TaskConfig
from pipeline.tasks.review import Mistake, class_scores, confusion, reliability, review, worst
from pipeline.tasks.scores import ALONE, Metrics, read_tensor

# N row of the table, B batch, C class

GIVEN = 0.5
"""Probability above which a sample is given one of any number of labels, as the scores have it."""


class OfClasses(Task):
    """A task whose outputs are a logit for each class; classes are the labels of the training split, sorted."""

    problem: ClassVar[Literal["single_label_classification", "multi_label_classification"]]

    def __init__(self, config: TaskConfig) -> None:
        self.label_smoothing = config.label_smoothing
        self.layers = config.layers
        self.balanced = config.class_weights == "balanced"
        self.monitor = config.monitor or SCORES[self.name][0]
        self._weights: Tensor | None = None

    def head(self, table: Table) -> Head:
        labels = tuple(map(str, self.classes(table)))
        return Head("classes", size=len(labels), layers=self.layers, labels=labels, problem=self.problem)

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

    def linear_target(self, targets: Mapping[str, Tensor]) -> Tensor:
        return targets["label"]

    def chance(self, table: Table) -> float | None:
        labels = column(table, "label", self.name)
        answers, counts = np.unique(labels[table.split == "train"], return_counts=True)
        own = labels[table.split == "validation"]
        return float((own == answers[counts.argmax()]).mean()) if self.monitor == "accuracy" and len(own) else None

    def metrics(self) -> Metrics:
        return SingleLabelScores(SCORES[self.name])

    def review(self, table: Table) -> Metrics:
        return SingleLabelReview(list(map(str, self.classes(table))))

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


class SingleLabelScores(Metrics):
    """`accuracy`, and `macro_f1`: the mean F1 of the classes that some sample has or was given, both in 0..1."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._counts_3C = torch.zeros(3, 1, dtype=torch.int64)

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        found_B, right_B, classes = output.argmax(1), targets["label"], output.shape[1]
        counts = [one.bincount(minlength=classes) for one in (found_B[found_B == right_B], found_B, right_B)]
        self._counts_3C = self._counts_3C + torch.stack(counts)

    def result(self) -> dict[str, float]:
        hits_C, found_C, right_C = self._counts_3C.double()
        seen_C = found_C + right_C > 0
        f1_C = 2 * hits_C[seen_C] / (found_C + right_C)[seen_C]
        return {"accuracy": float(hits_C.sum() / right_C.sum()), "macro_f1": float(f1_C.mean())}


class SingleLabelReview(Metrics):
    """Confusions, and the wrong labels that were given with the highest probability."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(())
        self._classes = classes
        self._seen: list[tuple[Tensor, ...]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._seen.append((targets["row"], targets["label"], *reversed(output.softmax(-1).max(-1))))

    def result(self) -> dict[str, Any]:
        rows, right, found, probability = (torch.cat(part).numpy() for part in zip(*self._seen, strict=True))
        hit, classes = found == right, self._classes
        counts = [np.bincount(one, minlength=len(classes)) for one in (right[hit], right, found)]
        mistakes = [
            Mistake(int(rows[i]), classes[right[i]], classes[found[i]], float(probability[i]))
            for i in worst(probability, ~hit)
        ]
        return review(
            len(rows),
            int((~hit).sum()),
            mistakes,
            "probability of the wrong label",
            confusion=confusion(right, found, classes),
            classes=class_scores(classes, *counts),
            reliability=reliability(probability, hit),
        )


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
