"""Scores of an embedding: for each query, are the samples that belong to it the nearest?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor

from pipeline.tasks.base import read_tensor
from pipeline.tasks.config import SCORES

# Q query, R reference, D channel

CALCULATED = {
    "precision_at_1": "precision_at_1",
    "reciprocal_rank": "mean_reciprocal_rank",
    "r_precision": "r_precision",
}
"""Our names of the scores -> those of pytorch-metric-learning."""

MAX_SIMILARITIES = 1 << 21
"""Similarities held at a time; with what the scores derive from them this is about 100 MB."""


class RetrievalScores:
    """`precision_at_1`, `reciprocal_rank` and `r_precision` by cosine, each the mean over queries, in 0..1.

    Of pairs, anchors are queries among all positives. Otherwise each sample is a query among all others. Queries that
    nothing belongs to do not count.
    """

    def __init__(self) -> None:
        self.reset()

    def update(self, output: Any, targets: Mapping[str, Tensor]) -> None:
        embeddings = read_tensor(output).detach().float().cpu()
        roles = targets["role"] if "role" in targets else torch.full((len(embeddings),), -1)
        self._embeddings.append(embeddings)
        self._groups.append(targets["group"].cpu())
        self._roles.append(roles.cpu())

    def compute(self) -> dict[str, float]:
        if not self._embeddings:
            return dict.fromkeys(SCORES["similarity"], float("nan"))
        embeddings, groups, roles = (torch.cat(seen) for seen in (self._embeddings, self._groups, self._roles))
        if (roles >= 0).all():
            return rank(embeddings[roles == 0], groups[roles == 0], embeddings[roles == 1], groups[roles == 1])
        return rank(embeddings, groups, embeddings, groups, same=True)

    def reset(self) -> None:
        self._embeddings: list[Tensor] = []
        self._groups: list[Tensor] = []
        self._roles: list[Tensor] = []


def rank(
    queries_QD: Tensor, query_groups: Tensor, references_RD: Tensor, reference_groups: Tensor, *, same: bool = False
) -> dict[str, float]:
    """Return the scores of queries among references, some queries at a time.

    With `same`, queries and references are the same samples, and none is compared with itself.
    """
    calculator = AccuracyCalculator(
        include=tuple(CALCULATED.values()), device=torch.device("cpu"), knn_func=CustomKNN(CosineSimilarity())
    )
    counted = torch.nonzero(_has_match(query_groups, reference_groups, least=2 if same else 1)).flatten()
    sums = dict.fromkeys(CALCULATED, 0.0)
    step = max(1, MAX_SIMILARITIES // max(1, len(references_RD)))
    for start in range(0, len(counted), step):
        chosen = counted[start : start + step]
        if same:  # the calculator finds a query among the references by its place: the first ones are the queries
            rest = torch.ones(len(references_RD), dtype=torch.bool).index_fill_(0, chosen, False)
            order = torch.cat([chosen, torch.nonzero(rest).flatten()])
        else:
            order = torch.arange(len(references_RD))
        found = calculator.get_accuracy(
            queries_QD[chosen], query_groups[chosen], references_RD[order], reference_groups[order], same
        )
        for name, theirs in CALCULATED.items():
            sums[name] += found[theirs] * len(chosen)
    return {name: total / len(counted) if len(counted) else float("nan") for name, total in sums.items()}


def _has_match(query_groups: Tensor, reference_groups: Tensor, *, least: int) -> Tensor:
    """Say for each query whether at least so many references are of its group, (Q,) bool."""
    groups, counts = torch.unique(reference_groups, return_counts=True)
    return torch.isin(query_groups, groups[counts >= least])
