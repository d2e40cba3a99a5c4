"""The interface of a task: its head, numeric targets, units of rows, loss, scores and predictions."""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias

import numpy as np

from pipeline.errors import DataError, first_few
from pipeline.tasks.config import LOWER_IS_BETTER, Pooling
from pipeline.tasks.heads import Layer
from pipeline.tasks.scores import Metrics, read_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind: TypeAlias = "type | list[Kind] | dict[str, Kind]"
"""Type of a column of predictions: `str`, `int`, `float` or `bool`; a list of one type, as `[str]`; or a value per
name, as `{"cat": float, "dog": float}`."""

Column: TypeAlias = np.ndarray | Sequence[Any]
"""Predictions for B samples: (B,), (B, n) for lists of n or for n names in their order, or a sequence of B values."""

IGNORED = -100
"""A target that losses ignore (`ignore_index` of torch)."""


@dataclass(frozen=True)
class Ragged:
    """Lists of integers of different lengths, one for each of N rows; batches are padded with `IGNORED`."""

    values: np.ndarray
    """The values of all rows, concatenated, (V,) int64."""
    offsets: np.ndarray
    """Start of each row in `values`, and the end of the last, (N + 1,) int64."""

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
    """The part of a sample table that a task reads: N rows."""

    @property
    def split(self) -> np.ndarray:
        """Return the split of each row, (N,) str."""

    @property
    def targets(self) -> Mapping[str, np.ndarray]:
        """Return the target columns, each (N,); of dtype object where each entry is a list."""


@dataclass(frozen=True)
class PredictionContext:
    """Data of B samples, beside the outputs, that predictions may need."""

    extras: "Mapping[str, Tensor]"
    """Extras stored beside the state and the inputs, each (B, ...)."""
    look_up: Callable[[], Sequence[Mapping[str, Any]]]
    """Returns the targets of each sample from its source, which is slow; labels may be missing."""


@dataclass(frozen=True)
class Head:
    """The head that the network must end in."""

    kind: Literal["classes", "embedding", "tokens", "span", "language"]
    """"classes": logits, or numbers to regress, (B, size), from the architecture's own classifier. "embedding": one
    vector per sample (B, D). "tokens": logits of each token (B, T, size). "span": logits of each token as the first and
    as the last of a span, (B, 2, T) or an output with `start_logits` and `end_logits`. "language": the network's own
    logits of the next token, (B, T, V), from which the loss of each token is computed."""
    size: int | None = None
    """classes, tokens: number of classes."""
    pooling: Pooling | None = None
    """embedding: how the vectors of a sample become one: the mean or the largest over its unmasked tokens, the first
    token, or what the backbone itself pools. None takes the usual one: mean for texts, the backbone's own for images.
    """
    layers: tuple[Layer, ...] = ()
    """embedding: the layers after pooling, for `build_head`; without, D is the backbone's. classes, tokens: the layers
    before the last linear layer; without, the classifier is the architecture's own."""
    labels: tuple[str, ...] = ()
    """classes, tokens: name of each output, in order; none for numbers to regress."""
    on_all: bool = False
    """language: count all tokens, not only those that the network is to write."""
    untied: bool = False
    """language: the head has weights of its own, not those of the token embeddings."""
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """classes: the problem type in Hugging Face's configurations."""


class Task(ABC):
    """A task; `prepare` is called once before `loss` and `metrics`."""

    name: str
    monitor: str
    """Name of the score that decides which epoch is best."""
    minimum_units: int = 1
    """Minimum number of units in a training batch for a meaningful loss."""
    needs_reference: bool = False
    """Whether the loss compares each sample with what the network gave it before training: see `reference_of`."""
    reference: np.ndarray | None = None
    """These figures, (N,) float32 of the rows of the table; set before `prepare`."""
    width: int | None = None
    """Size D of the model's embeddings, if it has any and the size is known: see `of_width`."""

    def of_width(self, width: int | None) -> Self:
        """Return this task for a model whose embeddings have the size `width`, before it is prepared."""
        sized = copy.copy(self)
        sized.width = width
        return sized

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of `monitor` is better; False for errors."""
        return self.monitor not in LOWER_IS_BETTER

    @property
    def loss_module(self) -> "nn.Module | None":
        """The module with the parameters (class weights of ArcFace) and other state (a memory of earlier batches) of
        the loss, which checkpoints save; None if it has none. It is complete after `prepare`.
        """
        return None

    @abstractmethod
    def head(self, table: Table) -> Head:
        """Return the head this task needs on this data; raises DataError if the labels do not allow the task."""

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
    def loss(self, output: Any, targets: "Mapping[str, Tensor]") -> "Tensor":
        """Return the loss of a batch, a scalar; `output` is whatever the model returns."""

    def reference_of(self, output: Any) -> "Tensor":
        """Return the figure of each of B samples, (B,), that the loss compares; only where `needs_reference`."""
        raise NotImplementedError

    def linear_target(self, targets: "Mapping[str, Tensor]") -> "Tensor | None":
        """Return what a linear head should tell of a batch: labels (B,), for heads on tokens (B, T), or numbers (B, K),
        (B, T, K).

        Labels are int64, `IGNORED` for rows to leave out; of embeddings they are groups that belong together. Numbers
        are floating point, NaN for rows to leave out. None, the default: the task has no such head.
        """
        return None

    @abstractmethod
    def metrics(self) -> Metrics:
        """Return fresh scores."""

    def review(self, table: Table) -> Metrics | None:
        """Return a collector of outputs, whose result is the `pipeline.tasks.review` of a run on `table`.

        Its targets have the `row` of each sample too, (B,) int64. Default: None, a report shows the scores alone.
        """
        return None

    def chance(self, table: Table) -> float | None:
        """Return the score of validation that one answer for all samples gets. Default: None, it is not known."""
        return None

    def legend(self, table: Table) -> list[Any]:
        """Return the meaning of the outputs after training on `table`, as JSON: class names, say. Default: empty."""
        return []

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        """Return the columns of `predictions`."""
        return {"output": [float]}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        """Return predictions by column for a batch of B outputs; `legend` is that of the run. Default: the output."""
        numbers = read_tensor(output).float().cpu()
        return {"output": numbers.reshape(len(numbers), -1).numpy()}


def paired_rows(table: Table, split: str, roles: tuple[str, str]) -> np.ndarray:
    """Return the rows of a split in pairs, (U, 2) int64, those of the first role first, in the order of the pairs."""
    rows = np.flatnonzero(table.split == split)
    pairs, found = table.targets["pair"][rows], table.targets["role"][rows]
    return np.stack([rows[found == role][np.argsort(pairs[found == role])] for role in roles], axis=1)


def column(table: Table, name: str, task: str) -> np.ndarray:
    """Return a target column; raises DataError if the sample table lacks it."""
    if name not in table.targets:
        known = ", ".join(table.targets) or "none"
        raise DataError(f"task {task} needs the target {name}; the samples have {known}; set another task or source")
    return table.targets[name]


def refuse_unseen(unseen: Collection[Any], what: str, samples: str = "held-out samples") -> None:
    """Raise DataError if `samples` have labels, `unseen`, that no training sample has; `what` says what they are."""
    if unseen:
        raise DataError(
            f"{samples} have {len(unseen)} {what} that training lacks ({first_few(map(repr, sorted(unseen)))}); "
            "add training samples of them, leave them out, or set another data.seed or data.validation"
        )
