"""Preference optimisation of a language model: of two answers to a prompt, the better one is made likelier.

The reference of dpo and ipo is the suffix itself before training, on the same states: no second network is held.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.tasks.base import Head, Prepared, Table, paired_rows
from pipeline.tasks.config import SCORES, TaskConfig
from pipeline.tasks.lm import LanguageModelling
from pipeline.tasks.review import Mistake, review
from pipeline.tasks.scores import Metrics, read_tensor

ROLES = ("chosen", "rejected")
LOSSES = ("dpo", "ipo", "orpo")

# B batch, P pair, T token


class Preference(LanguageModelling):
    """Pairs of answers (samples with the targets `pair` and `role`), of which the chosen one is to become likelier."""

    name = "preference"

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if config.loss not in LOSSES:
            raise ConfigError(f"task.loss is {config.loss!r}; preference has {', '.join(LOSSES)}; choose one of these")
        self.config, self.needs_reference = config, config.loss != "orpo"

    def head(self, table: Table) -> Head:
        roles = set(np.unique(table.targets.get("role", np.empty(0, str))).tolist())
        if roles != set(ROLES):
            needs = "set data.chosen and data.rejected of source completions or chat"
            raise DataError(f"the samples have the roles {sorted(roles)}; preference needs {sorted(ROLES)}: {needs}")
        return Head("language", untied=self.untied)

    def prepare(self, table: Table) -> dict[str, Prepared]:
        pair_N = np.unique(table.targets["pair"], return_inverse=True)[1].astype(np.int64)
        unknown_N = np.full(len(pair_N), np.nan if self.needs_reference else 0, np.float32)
        reference_N = unknown_N if self.reference is None else self.reference
        role_N = np.array([ROLES.index(role) for role in table.targets["role"].tolist()], np.int64)
        return {"pair": pair_N, "role": role_N, "reference": reference_N}

    def units(self, table: Table, split: str, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
        return paired_rows(table, split, ROLES)

    def reference_of(self, output: Any) -> Tensor:
        """Return the log-probability of each answer, (B,); for ipo the mean over its tokens."""
        loss_BT, _, counted_BT = read_tensor(output).float().unbind(-1)
        log_probability_B = -loss_BT.sum(1)
        return log_probability_B if self.config.loss == "dpo" else log_probability_B / counted_BT.sum(1).clamp(min=1)

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        return self._compared(self.reference_of(output), targets)[0].mean()

    def metrics(self) -> Metrics:
        return PreferenceScores(self)

    def review(self, table: Table) -> Metrics:
        return PreferenceReview(self)

    def _compared(self, policy_B: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the margin of the rewards of each pair, (P,) each."""
        order_B = torch.argsort(2 * targets["pair"] + targets["role"])
        policy_P2, reference_P2 = (one[order_B].view(-1, 2) for one in (policy_B, targets["reference"]))
        beta = self.config.beta
        gain_P = (policy_P2 - reference_P2) @ policy_P2.new_tensor([1.0, -1.0])
        margin_P = beta * gain_P
        if self.config.loss == "ipo":
            return (gain_P - 1 / (2 * beta)) ** 2, margin_P
        if self.config.loss == "orpo":
            # log(1 - p) of a mean probability that rounds to 1 would be infinite
            odds_P2 = policy_P2 - torch.log1p(-policy_P2.clamp(max=-1e-6).exp())
            return -policy_P2[:, 0] - beta * F.logsigmoid(odds_P2[:, 0] - odds_P2[:, 1]), margin_P
        wrong = self.config.label_smoothing
        return -(1 - wrong) * F.logsigmoid(margin_P) - wrong * F.logsigmoid(-margin_P), margin_P


class PreferenceScores(Metrics):
    """`loss`, `reward_accuracy` (share of pairs whose better answer gained more) and `reward_margin`, over all pairs.

    A batch may have one of a pair and another batch the other.
    """

    def __init__(self, task: Preference) -> None:
        super().__init__(SCORES["preference"])
        self._task = task
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        named = {name: targets[name] for name in ("pair", "role", "reference", "row") if name in targets}
        self._parts.append((self._task.reference_of(output), named))

    def compared(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return loss and margin of each pair, (P,) each, and the targets of all samples."""
        targets = {name: torch.cat([part[name] for _, part in self._parts]) for name in self._parts[0][1]}
        loss_P, margin_P = self._task._compared(torch.cat([policy for policy, _ in self._parts]), targets)
        return loss_P, margin_P, targets

    def result(self) -> dict[str, Any]:
        loss_P, margin_P, _ = self.compared()
        accuracy = (margin_P > 0).float().mean()
        return dict(zip(self._names, (loss_P.mean().item(), accuracy.item(), margin_P.mean().item()), strict=True))


class PreferenceReview(PreferenceScores):
    """The pairs whose worse answer gained most over the better one."""

    def result(self) -> dict[str, Any]:
        _, margin_P, targets = self.compared()
        order = torch.argsort(2 * targets["pair"] + targets["role"])
        rows_P2 = targets["row"][order].view(-1, 2)
        mistakes = [
            Mistake(rejected, "this answer rejected", f"preferred by {-margin:.3f}", -margin)
            for (_, rejected), margin in zip(rows_P2.tolist(), margin_P.tolist(), strict=True)
            if margin <= 0
        ]
        severity = "how much more the rewards favour the rejected answer"
        return review(len(margin_P), len(mistakes), mistakes, severity, unit="pairs")
