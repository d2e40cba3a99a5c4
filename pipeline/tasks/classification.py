"""One label for each sample (cross entropy, accuracy), and what tasks with a logit for each class share."""

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
from pipeline.tasks.scores import Metrics, read_tensor

# N row of the table, B batch, C class


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
