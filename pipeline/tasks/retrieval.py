"""Scores of an embedding: for each query, are the samples that belong to it the nearest?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.retrieval import RetrievalMRR, RetrievalPrecision, RetrievalRPrecision

from pipeline.tasks.base import read_tensor
from pipeline.tasks.config import SCORES

# Q query, R reference, D channel

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
        self._embeddings.append(F.normalize(embeddings, dim=1))
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
    """Return the scores of normalised queries among normalised references, some queries at a time.

    With `same`, queries and references are the same samples, and none is compared with itself.
    """
    scores = {
        "precision_at_1": RetrievalPrecision(top_k=1),
        "reciprocal_rank": RetrievalMRR(),
        "r_precision": RetrievalRPrecision(),
    }
    sums, counted = dict.fromkeys(scores, 0.0), 0
    step = max(1, MAX_SIMILARITIES // max(1, len(references_RD)))
    for start in range(0, len(queries_QD), step):
        similar_QR = queries_QD[start : start + step] @ references_RD.T
        belongs_QR = query_groups[start : start + step, None] == reference_groups[None]
        others_QR = torch.ones_like(belongs_QR)
        if same:
            others_QR.diagonal(offset=start).fill_(False)
        others_QR &= (belongs_QR & others_QR).any(dim=1, keepdim=True)
        numbers_QR = torch.arange(len(similar_QR))[:, None].expand_as(similar_QR)
        found = int(others_QR.any(dim=1).sum())
        for name, score in scores.items() if found else ():
            score.update(similar_QR[others_QR], belongs_QR[others_QR], indexes=numbers_QR[others_QR])
            sums[name] += float(score.compute()) * found
            score.reset()
        counted += found
    return {name: total / counted if counted else float("nan") for name, total in sums.items()}
