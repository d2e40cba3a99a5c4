"""Metric learning: embeddings in which pairs, or samples with one label, are near each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, TrainError
from pipeline.tasks.base import Column, Head, Kind, PredictionContext, Table, Task, column, paired_rows
from pipeline.tasks.config import TaskConfig, retrieval_scores
from pipeline.tasks.heads import last_width
from pipeline.tasks.losses import Memory, choose, make_loss, make_miner
from pipeline.tasks.retrieval import RetrievalReview, RetrievalScores
from pipeline.tasks.scores import Metrics, read_tensor

ROLES = ("anchor", "positive")

# B batch, D channel


class Similarity(Task):
    """Metric learning on pairs (samples with targets `pair`, `role` and `group`), or on samples under a `label`."""

    name = "similarity"

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.monitor = config.monitor or retrieval_scores(config.precision_at)[0]
        self._kind = choose("loss", config.loss, config.distance)
        if config.memory is not None and self._kind.compares != "pairs":
            raise ConfigError(
                f"task.memory is {config.memory}; loss {config.loss} compares no sample with another batch's: remove it"
            )
        # Without a memory, one pair or one label per batch leaves nothing to tell it from.
        self.minimum_units = 2 if config.memory is None and self._kind.compares != "vectors" else 1
        self._miner = make_miner(
            config.miner, config.miner_options, config.distance, loss=config.loss, loss_options=config.loss_options
        )
        self._loss = None if self._kind.compares == "vectors" else self._make_loss()
        self._memories: nn.ModuleList | None = None

    @property
    def loss_module(self) -> nn.Module | None:
        return self._loss if self._kind.compares == "vectors" else self._memories

    def head(self, table: Table) -> Head:
        return Head("embedding", pooling=self.config.pooling, layers=self.config.layers)

    def prepare(self, table: Table) -> dict[str, np.ndarray]:
        names, pairs = self._names(table), _is_pairs(table)
        known = np.unique(names[table.split == "train"])
        if len(known) < 2:
            raise DataError(f"the training split has {len(known)} labels or groups; similarity needs two or more")
        if pairs and self._kind.compares != "pairs":
            raise ConfigError(f"task.loss is {self.config.loss!r}, which needs labels; for pairs set another loss")
        for split in ("validation",) if self._kind.compares == "vectors" else ("train", "validation"):
            _check_split(table, names, split)
        # Labels of the training split come first, because a loss with vectors per label numbers them from 0.
        order = np.concatenate([known, np.setdiff1d(names, known)])
        numbers = {name: number for number, name in enumerate(order.tolist())}
        targets = {"group": np.array([numbers[name] for name in names.tolist()], np.int64)}
        if pairs:
            targets["role"] = np.array([ROLES.index(role) for role in table.targets["role"].tolist()], np.int64)
        self._make_state_once(len(known), sides=2 if pairs and self.config.symmetric else 1)
        return targets

    def _make_loss(self, **sizes: int) -> nn.Module:
        return make_loss(self.config.loss, self.config.loss_options, self.config.distance, **sizes)

    def _make_state_once(self, labels: int, sides: int) -> None:
        """Create the loss's own parameters and memory once: later calls must not reset them."""
        config = self.config
        if self._loss is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self._loss = self._make_loss(labels=labels, width=self._width("task.loss", config.loss))
        if config.memory is not None and self._memories is None:
            width = self._width("task.memory", config.memory)
            memories = [Memory(self._loss, width, config.memory, self._miner) for _ in range(sides)]
            self._memories = nn.ModuleList(memories)

    def _width(self, setting: str, value: object) -> int:
        width = self.width or last_width(self.config.layers)
        if width is None:
            raise ConfigError(
                f"{setting} is {value!r}, which must know the size of the embeddings, and the backbone does not tell: "
                "end task.layers in a linear layer, as in [256]"
            )
        return width

    def _names(self, table: Table) -> np.ndarray:
        names = column(table, "group" if _is_pairs(table) else "label", self.name)
        if names.dtype.kind not in "iuUS":
            raise DataError(f"the labels are {names.dtype}; similarity needs names or whole numbers, one per sample")
        return names

    def units(self, table: Table, split: str, *, seed: int = 0, epoch: int = 0) -> np.ndarray | list[np.ndarray]:
        rows = np.flatnonzero(table.split == split)
        if _is_pairs(table):
            return paired_rows(table, split, ROLES)
        if split != "train":
            return rows
        return draw_groups(rows, self._names(table)[rows], self.config.samples_per_label, seed=seed, epoch=epoch)

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        # The losses exponentiate: half precision is not enough for them.
        embeddings_BD, groups_B = read_tensor(output).float(), targets["group"]
        with torch.autocast(embeddings_BD.device.type, enabled=False):
            if "role" not in targets:
                return self._compare(embeddings_BD, groups_B)
            there = self._compare(embeddings_BD, groups_B, targets["role"] == 1)
            if not self.config.symmetric:
                return there
            return (there + self._compare(embeddings_BD, groups_B, targets["role"] == 0, side=1)) / 2

    def _compare(
        self, embeddings_BD: Tensor, groups_B: Tensor, others_B: Tensor | None = None, *, side: int = 0
    ) -> Tensor:
        """Return the loss of a batch with itself, or of its samples with `others_B` of them; and with the memory."""
        if self._loss is None or (self.config.memory is not None and self._memories is None):
            raise TrainError(f"task.loss {self.config.loss} has state of its own; call prepare(table) before the loss")
        anchors, references = (embeddings_BD, groups_B), {}
        if others_B is not None:
            anchors = (embeddings_BD[~others_B], groups_B[~others_B])
            references = {"ref_emb": embeddings_BD[others_B], "ref_labels": groups_B[others_B]}
        chosen = None if self._miner is None else self._miner(*anchors, **references)
        loss: Tensor = self._loss(*anchors, chosen, **references)
        if self._memories is not None:  # gradients reach the memory's side through the batch alone
            loss = loss + self._memories[side](embeddings_BD, groups_B, enqueue_mask=others_B)
        return loss

    def linear_target(self, targets: Mapping[str, Tensor]) -> Tensor:
        return targets["group"]

    def metrics(self) -> Metrics:
        return RetrievalScores(self.config.distance, self.config.precision_at)

    def review(self, table: Table) -> Metrics:
        labels = None if _is_pairs(table) else self._names(table).astype(str)
        return RetrievalReview(self.config.distance, labels)

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"embedding": [float]}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        return {"embedding": read_tensor(output).float().cpu().numpy()}


def draw_groups(rows: np.ndarray, labels: np.ndarray, size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Return units of `size` rows under one label, drawn anew each epoch; every row is in at least one.

    P such units make a batch of P x K: with `order.batches`, P is the batch size. A label's last unit is filled up from
    its first; a label with fewer rows than `size` is one smaller unit.
    """
    rng = np.random.default_rng([seed, epoch, size])
    by_label = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, labels[by_label][1:] != labels[by_label][:-1]])
    units = []
    for members in np.split(rows[by_label], starts[1:]):
        drawn = rng.permutation(members)
        if len(drawn) > size:
            drawn = np.concatenate([drawn, drawn[: -len(drawn) % size]])
        units += [drawn[start : start + size] for start in range(0, len(drawn), size)]
    return units


def _is_pairs(table: Table) -> bool:
    return "pair" in table.targets


def _check_split(table: Table, names: np.ndarray, split: str) -> None:
    """Check that some samples of the split match; raises DataError if none do."""
    rows = table.split == split
    if _is_pairs(table):
        anchors, positives = (names[rows & (table.targets["role"] == role)] for role in ROLES)
        if not np.isin(anchors, positives).any():
            raise DataError(f"the {split} split has no pair that belongs together; set data.validation, or add pairs")
        return
    if not rows.any():
        raise DataError(f"the {split} split is empty; set data.validation, or give the samples a split")
    if np.unique(names[rows], return_counts=True)[1].max() < 2:
        raise DataError(f"no label of the {split} split has two samples; similarity compares samples of one label")
