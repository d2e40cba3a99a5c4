"""Language modelling: the loss of each token from the network; loss per token, perplexity and accuracy over tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks.base import Column, Head, Kind, PredictionContext, Prepared, Table, Task
from pipeline.tasks.config import SCORES, TaskConfig
from pipeline.tasks.review import Mistake, review
from pipeline.tasks.scores import Metrics, read_tensor

# B batch, T token


class LanguageModelling(Task):
    """The next token of texts, completions and chats; the targets are the tokens themselves."""

    name = "lm"

    def __init__(self, config: TaskConfig) -> None:
        self.on_all, self.untied = config.loss_on == "all", config.untie_head
        self.monitor = config.monitor or SCORES[self.name][0]

    def head(self, table: Table) -> Head:
        return Head("language", on_all=self.on_all, untied=self.untied)

    def prepare(self, table: Table) -> dict[str, Prepared]:
        return {}

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        loss_BT, _, counted_BT = read_tensor(output).unbind(-1)
        return loss_BT.sum() / counted_BT.sum().clamp(min=1)

    def metrics(self) -> Metrics:
        return TokenScores()

    def review(self, table: Table) -> Metrics:
        return TokenReview()

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"loss": float, "tokens": int, "token_accuracy": float}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        """Return the mean loss of the tokens of each sample, their number, and the share that is the likeliest."""
        loss_B, right_B, tokens_B = _sums(read_tensor(output).float().cpu()).T.numpy()
        return {"loss": loss_B / tokens_B, "tokens": tokens_B.astype(np.int64), "token_accuracy": right_B / tokens_B}


class TokenScores(Metrics):
    """`loss` in nats per token, `perplexity`, and `token_accuracy` in 0..1, over all counted tokens of all samples."""

    def __init__(self) -> None:
        super().__init__(SCORES["lm"])
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._sums += _sums(output).sum(0)

    def result(self) -> dict[str, float]:
        loss, right, tokens = self._sums.tolist()
        if not tokens:
            return dict.fromkeys(self._names, math.nan)
        mean = loss / tokens
        return {"loss": mean, "perplexity": torch.tensor(mean).exp().item(), "token_accuracy": right / tokens}


class TokenReview(Metrics):
    """The samples with the largest mean loss."""

    def __init__(self) -> None:
        super().__init__(SCORES["lm"])
        self._mistakes: list[Mistake] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        for row, (loss, right, tokens) in zip(targets["row"].tolist(), _sums(output).tolist(), strict=True):
            mean = loss / tokens
            self._mistakes.append(
                Mistake(row, f"{tokens:.0f} tokens", f"{right:.0f} of them, loss {mean:.2f} nats per token", mean)
            )

    def result(self) -> dict[str, Any]:
        return review(len(self._mistakes), None, self._mistakes, "mean loss of the tokens, in nats")


def _sums(output_BT3: Tensor) -> Tensor:
    """Return for each sample the loss of its tokens, how many are the likeliest, and their number, (B, 3) float64."""
    loss_BT, distance_BT, counted_BT = output_BT3.double().unbind(-1)
    right_BT = (distance_BT == 0) & (counted_BT > 0)
    return torch.stack([loss_BT.sum(1), right_BT.sum(1), counted_BT.sum(1)], dim=1)
