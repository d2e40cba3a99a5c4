"""What a task is: it asks for a head, turns labels into numbers, groups rows, and scores outputs."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import DataError, TrainError
from pipeline.tasks.config import LOWER_IS_BETTER
from pipeline.tasks.heads import Layer

Kind: TypeAlias = "type | list[Kind] | dict[str, Kind]"
"""What a column of predictions holds: `str`, `int`, `float` or `bool`; any number of one kind, as `[str]`; or a value
under each name, as `{"cat": float, "dog": float}`."""

Column: TypeAlias = np.ndarray | Sequence[Any]
"""Predictions for B samples: (B,), (B, n) for lists of n or for n names in their order, or a sequence of B values."""


@dataclass(frozen=True)
class PredictionContext:
    """What is known of B samples whose outputs are read."""

    extras: Mapping[str, Tensor]
    """What is stored of them beside the state and the inputs, each (B, ...)."""
    look_up: Callable[[], Sequence[Mapping[str, Any]]]
    """Returns what their source says of each, which takes time; labels may be missing."""


ALONE: Mapping[str, Any] = {"sync_on_compute": False}
"""For the scores of torchmetrics: one process has the outputs of all, and asks no other."""

IGNORED = -100
"""A target that counts for nothing; the losses of torch know it."""


@dataclass(frozen=True)
class Head:
    """What the suffix must end in."""

    kind: Literal["classes", "embedding", "tokens", "span"]
    """"classes": logits, or numbers to regress, (B, size), from the architecture's own classifier. "embedding": one
    vector per sample (B, D). "tokens": logits of each token (B, T, size). "span": logits of each token as the first and
    as the last of a span, (B, 2, T) or an output with `start_logits` and `end_logits`."""
    size: int | None = None
    """classes, tokens: how many classes."""
    pooling: Literal["mean", "cls", "max", "pooled"] | None = None
    """embedding: how the vectors of a sample become one: the mean or the largest over its unmasked tokens, the first
    token, or what the backbone itself pools. None takes the usual one: mean for texts, the backbone's own for images.
    """
    layers: tuple[Layer, ...] = ()
    """embedding: the layers after pooling, for `build_head`; without, D is the backbone's."""
    labels: tuple[str, ...] = ()
    """classes, tokens: what each output stands for, in their order; none where they are numbers to regress."""
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """classes: how the outputs are read, in the words of Hugging Face's configurations."""


@dataclass(frozen=True)
class Ragged:
    """Whole numbers of N rows, not equally many in each; in a batch, rows are filled up with `IGNORED`."""

    values: np.ndarray
    """Those of all rows, end to end, (V,) int64."""
    offsets: np.ndarray
    """Where each row begins in `values`, and where the last one ends, (N + 1,) int64."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Self:
        """Return the numbers of `rows`."""
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        return cls(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return `rows` (B,) as (B, W), W the longest of them."""
        begins = self.offsets[rows]
        lengths = self.offsets[rows + 1] - begins
        places = np.arange(lengths.max(initial=0))
        inside = places < lengths[:, None]
        padded = np.full(inside.shape, IGNORED, np.int64)
        padded[inside] = self.values[(begins[:, None] + places)[inside]]
        return padded


Prepared: TypeAlias = np.ndarray | Ragged
"""A numeric target of all rows of a table."""


class Table(Protocol):
    """What a task reads of a sample table: N rows."""

    @property
    def split(self) -> np.ndarray:
        """Return the split of each row, (N,) str."""

    @property
    def targets(self) -> Mapping[str, np.ndarray]:
        """Return the target columns, each (N,); of dtype object where each entry is a list."""


class Metrics(Protocol):
    """A running score over batches; on the CPU, whatever device the outputs are on.

    Of several processes the main one alone scores, with the outputs of all of them.
    """

    def update(self, output: Any, targets: Mapping[str, Tensor]) -> None:
        """Take in one batch: the model's output, and the prepared targets of its rows."""

    def compute(self) -> dict[str, float]:
        """Return the scores over all batches since `reset`."""

    def reset(self) -> None:
        """Forget all batches."""


class Task(ABC):
    """A task; `prepare` is called once before `loss` and `metrics`."""

    name: str
    monitor: str
    """Name of the score that decides which epoch is best."""
    minimum_units: int = 1
    """Units that a training batch must have for the loss to mean something."""
    width: int | None = None
    """Size D of the embeddings that the model gives, where it gives some and it is known; set before `prepare`."""

    @property
    def higher_is_better(self) -> bool:
        """Say in which direction `monitor` is better: the lower, where it is an error."""
        return self.monitor not in LOWER_IS_BETTER

    @property
    def loss_module(self) -> nn.Module | None:
        """What a checkpoint must hold of the loss: parameters that train along (class weights of ArcFace) and other
        state (a memory of earlier batches); None if it has none. It is complete after `prepare`.
        """
        return None

    @abstractmethod
    def head(self, table: Table) -> Head:
        """Return the head this task needs on this data.

        Raises:
            DataError: the labels do not allow the task.
        """

    @abstractmethod
    def prepare(self, table: Table) -> Mapping[str, Prepared]:
        """Return numeric targets, one row per row of the table; they come back batch by batch, in `loss` and `update`.

        With them come the extras of the preprocessing that the head asks for: `word` (B, T) for tokens, `chars`
        (B, T, 2) for span, as `pipeline.models.texts` makes them.

        Raises:
            DataError: the labels do not allow the task; the message names rows or labels.
        """

    def units(self, table: Table, split: str, *, seed: int = 0, epoch: int = 0) -> np.ndarray | list[np.ndarray]:
        """Return the rows of a split in units that stay together in a batch, for `order.batches`.

        (U,) or (U, R) int64, or U arrays where units differ in size. A pure function of its arguments. Here: every row
        by itself.
        """
        return np.flatnonzero(table.split == split)

    @abstractmethod
    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch, a scalar; `output` is whatever the model returns."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """Return fresh scores."""

    def legend(self, table: Table) -> list[Any]:
        """Return what the outputs of a model that is trained on `table` mean: names of classes, say. A run keeps it.

        It holds what JSON can hold. Empty where outputs speak for themselves, as here.
        """
        return []

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        """Return the columns of `predictions`."""
        return {"output": [float]}

    def predictions(self, output: Any, asked: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        """Return what the model's `output` for a batch of B samples says, by column.

        `legend` is the run's. Here: the numbers of the output as they come.
        """
        numbers = read_tensor(output).float().cpu()
        return {"output": numbers.reshape(len(numbers), -1).numpy()}


def column(table: Table, name: str, task: str) -> np.ndarray:
    """Return a target column.

    Raises:
        DataError: the sample table lacks it; the message names those it has.
    """
    if name not in table.targets:
        known = ", ".join(table.targets) or "none"
        raise DataError(f"task {task} needs the target {name}; the samples have {known}; set another task or source")
    return table.targets[name]


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence what a library of scores warns of, where it is what this code means to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def read_tensor(output: Any) -> Tensor:
    """Return the tensor that a model's output carries: itself, its `logits`, or the first of a tuple.

    Of a span's logits, `start_logits` and `end_logits` (B, T), it is both, (B, 2, T).

    Raises:
        TrainError: it carries none.
    """
    if isinstance(output, Mapping) and "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=1)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TrainError(
            f"the model returned {type(output).__name__}; expected a tensor, an output with .logits, or a tuple"
        )
    return found
