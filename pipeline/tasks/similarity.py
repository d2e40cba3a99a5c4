"""An embedding in which what belongs together is near: pairs of texts, or samples under one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, TrainError
from pipeline.tasks.base import Asked, Column, Head, Kind, Metrics, Table, Task, column, read_tensor
from pipeline.tasks.config import LABEL_LOSSES, SCORES, TaskConfig
from pipeline.tasks.losses import make_loss, make_miner
from pipeline.tasks.retrieval import RetrievalScores

ROLES = ("anchor", "positive")


class Similarity(Task):
    """Metric learning on pairs (samples with targets `pair`, `role` and `group`), or on samples under a `label`."""

    name = "similarity"

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.monitor = config.monitor or SCORES[self.name][0]
        self.miner = None if config.miner is None else make_miner(config.miner, config.miner_options)
        self._by_label = config.loss in LABEL_LOSSES
        self._loss = None if self._by_label else make_loss(config.loss, config.loss_options)

    @property
    def loss_module(self) -> nn.Module | None:
        return self._loss if self._by_label else None

    def head(self, table: Table) -> Head:
        return Head("embedding", pooling=self.config.pooling, layers=self.config.layers)

    def prepare(self, table: Table) -> dict[str, np.ndarray]:
        names = self._names(table)
        training, held_out = table.split == "train", table.split == "validation"
        known = np.unique(names[training])
        if len(known) < 2:
            raise DataError(f"the training split has {len(known)} labels or groups; similarity needs two or more")
        if _is_pairs(table):
            if self._by_label:
                raise ConfigError(f"task.loss is {self.config.loss!r}, which needs labels; for pairs set another loss")
        else:
            if not self._by_label:
                _check_matches(names[training], "training")
            _check_matches(names[held_out], "validation")
        # Labels of the training split come first, because a loss with vectors per label numbers them from 0.
        order = np.concatenate([known, np.setdiff1d(names, known)])
        numbers = {name: number for number, name in enumerate(order.tolist())}
        targets = {"group": np.array([numbers[name] for name in names.tolist()], np.int64)}
        if _is_pairs(table):
            targets["role"] = np.array([ROLES.index(role) for role in table.targets["role"].tolist()], np.int64)
        self._make_loss_once(len(known))
        return targets

    def _make_loss_once(self, labels: int) -> None:
        """Make the loss that has weights of its own: later calls must leave those being trained as they are."""
        if self._loss is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                config = self.config
                self._loss = make_loss(config.loss, config.loss_options, labels=labels, width=config.layers[-1])

    def _names(self, table: Table) -> np.ndarray:
        return column(table, "group" if _is_pairs(table) else "label", self.name)

    def units(self, table: Table, split: str, *, seed: int = 0, epoch: int = 0) -> np.ndarray | list[np.ndarray]:
        rows = np.flatnonzero(table.split == split)
        if _is_pairs(table):
            pairs, roles = table.targets["pair"][rows], table.targets["role"][rows]
            anchors, positives = (rows[roles == role][np.argsort(pairs[roles == role])] for role in ROLES)
            return np.stack([anchors, positives], axis=1)
        if split != "train":
            return rows
        return draw_groups(rows, self._names(table)[rows], self.config.samples_per_label, seed=seed, epoch=epoch)

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        # The losses exponentiate: half precision is not enough for them.
        embeddings_BD, groups_B = read_tensor(output).float(), targets["group"]
        if "role" not in targets:
            return self._compare(embeddings_BD, groups_B)
        anchors, positives = targets["role"] == 0, targets["role"] == 1
        there = self._compare(embeddings_BD[anchors], groups_B[anchors], embeddings_BD[positives], groups_B[positives])
        if not self.config.symmetric:
            return there
        back = self._compare(embeddings_BD[positives], groups_B[positives], embeddings_BD[anchors], groups_B[anchors])
        return (there + back) / 2

    def _compare(
        self, embeddings: Tensor, groups: Tensor, others: Tensor | None = None, their: Tensor | None = None
    ) -> Tensor:
        if self._loss is None:
            raise TrainError(f"task.loss {self.config.loss} has weights per label; call prepare(table) before the loss")
        references = {} if others is None else {"ref_emb": others, "ref_labels": their}
        chosen = None if self.miner is None else self.miner(embeddings, groups, **references)
        loss: Tensor = self._loss(embeddings, groups, chosen, **references)
        return loss

    def metrics(self) -> Metrics:
        return RetrievalScores()

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"embedding": [float]}

    def predictions(self, output: Any, asked: Asked, legend: Sequence[Any]) -> Mapping[str, Column]:
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


def _check_matches(names: np.ndarray, split: str) -> None:
    if len(names) and np.unique(names, return_counts=True)[1].max() < 2:
        raise DataError(f"no label of the {split} split has two samples; similarity compares samples of one label")
