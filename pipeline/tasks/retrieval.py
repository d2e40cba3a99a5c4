"""Scores of an embedding: for each query, are the samples that belong to it the nearest?

They are computed some queries at a time, so that memory is that of the embeddings, twice, and what `MAX_SIMILARITIES`
allows. Of references that are equally near, those that do not belong come first: an embedding in which all samples are
one scores nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.tasks.config import retrieval_scores
from pipeline.tasks.losses import make_distance
from pipeline.tasks.scores import Scores

# Q query, R reference, D channel, M member (reference of the query's group), K nearest

MAX_SIMILARITIES = 1 << 24
"""Similarities held at a time, 64 MB; peak memory is 2 times that, 8 times if half of the samples are one group."""
NEVER = torch.iinfo(torch.int64).max
EQUAL = 1e-6
"""Similarities that are no further apart count as equal, relative to their size where that is above 1."""


class RetrievalScores(Scores):
    """`precision_at_<k>`, `reciprocal_rank` and `r_precision`, each the mean over queries, in 0..1.

    Of pairs, anchors are queries among all positives. Otherwise each sample is a query among all others. Queries that
    nothing belongs to do not count. Precision at k is the share of the k nearest that belongs to the query, R-precision
    that of the R nearest where R belong to it, and the reciprocal rank that of the first that does.
    """

    def __init__(self, distance: str = "cosine", precision_at: Sequence[int] = (1,)) -> None:
        super().__init__(retrieval_scores(tuple(precision_at)))
        self._distance, self._precision_at = distance, tuple(precision_at)
        self._queries: list[tuple[Tensor, Tensor]] = []
        self._references: list[tuple[Tensor, Tensor]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        groups_B = targets["group"]
        positive_B = targets["role"] == 1 if "role" in targets else torch.zeros(len(output), dtype=torch.bool)
        self._queries.append((output[~positive_B], groups_B[~positive_B]))
        if "role" in targets:
            self._references.append((output[positive_B], groups_B[positive_B]))

    def result(self) -> dict[str, float]:
        references = _cat(self._references) if self._references else (None, None)
        return rank(*_cat(self._queries), *references, distance=self._distance, precision_at=self._precision_at)


def rank(
    query_QD: Tensor,
    group_Q: Tensor,
    reference_RD: Tensor | None = None,
    group_R: Tensor | None = None,
    *,
    distance: str = "cosine",
    precision_at: Sequence[int] = (1,),
) -> dict[str, float]:
    """Return the scores of queries among references, or among the other queries, float32 on the CPU, in blocks."""
    measure: Any = make_distance(distance)
    query_QD = _ready(query_QD, measure)
    if reference_RD is None or group_R is None:
        reference_RD, members = query_QD, Members.of(group_Q, group_Q, itself=True)
    else:
        reference_RD, members = _ready(reference_RD, measure), Members.of(group_R, group_Q, itself=False)
    counted = torch.argsort(members.relevant)  # queries with as many members share their blocks' sizes
    counted = counted[members.relevant[counted] > 0]
    names = retrieval_scores(tuple(precision_at))
    if not len(counted):
        return dict.fromkeys(names, float("nan"))
    sums = torch.zeros(len(names), dtype=torch.float64)
    step = max(1, MAX_SIMILARITIES // len(reference_RD))
    for start in range(0, len(counted), step):
        chosen = counted[start : start + step]
        near_QR = measure.compute_mat(query_QD[chosen], reference_RD)
        if not measure.is_inverted:
            near_QR.neg_()
        sums += _sums(near_QR, *members.rows(chosen), members.relevant[chosen], precision_at)
    return dict(zip(names, (sums / len(counted)).tolist(), strict=True))


@dataclass(frozen=True)
class Members:
    """Which references are of each query's group."""

    order: Tensor
    """The references, sorted by group, (R,)."""
    start: Tensor
    """Where in `order` a query's group begins, (Q,)."""
    count: Tensor
    """How many references are of its group, (Q,)."""
    itself: bool
    """Whether the queries are the references."""

    @classmethod
    def of(cls, group_R: Tensor, group_Q: Tensor, itself: bool) -> Members:
        """Find the members of each query's group."""
        order = torch.argsort(group_R, stable=True)
        sorted_R = group_R[order]
        start_Q = torch.searchsorted(sorted_R, group_Q)
        return cls(order, start_Q, torch.searchsorted(sorted_R, group_Q, right=True) - start_Q, itself)

    @property
    def relevant(self) -> Tensor:
        """Number of references that belong to each query, without itself, (Q,)."""
        return self.count - 1 if self.itself else self.count

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the references of the groups of `chosen` queries, (Q, M), and which of them to count, (Q, M) bool.

        A group of fewer than M is filled up with its first member.
        """
        count_Q1 = self.count[chosen].unsqueeze(1)
        column_M = torch.arange(int(count_Q1.max()))
        counts_QM = column_M < count_Q1
        member_QM = self.order[self.start[chosen].unsqueeze(1) + torch.where(counts_QM, column_M, 0)]
        return member_QM, (counts_QM & (member_QM != chosen.unsqueeze(1)) if self.itself else counts_QM)


def _sums(
    near_QR: Tensor, member_QM: Tensor, counts_QM: Tensor, relevant_Q: Tensor, precision_at: Sequence[int]
) -> Tensor:
    """Return each score, summed over queries, float64; `near_QR` is overwritten."""
    right_QM = near_QR.gather(1, member_QM).masked_fill_(~counts_QM, float("-inf")).sort(dim=1, descending=True).values
    wrong_QR = near_QR.scatter_(1, member_QM, float("-inf"))
    least_QM = right_QM - EQUAL * right_QM.abs().clamp(min=1)
    nearest = min(max(int(relevant_Q.max()), *precision_at), wrong_QR.shape[1])
    wrong_QK = wrong_QR.topk(nearest, dim=1).values.flip(1)
    before_QM = nearest - torch.searchsorted(wrong_QK, least_QM)
    rank_QM = torch.arange(1, right_QM.shape[1] + 1) + before_QM
    rank_QM.masked_fill_(right_QM == float("-inf"), NEVER)
    # numpy counts what is true several times faster than torch, and in no more memory than the truths take
    first_Q = 1 + torch.from_numpy((wrong_QR >= least_QM[:, :1]).numpy().sum(axis=1))
    scores = [
        *((rank_QM <= k).sum(dim=1) / k for k in precision_at),
        1 / first_Q,
        (rank_QM <= relevant_Q.unsqueeze(1)).sum(dim=1) / relevant_Q,
    ]
    return torch.stack([score.double().sum() for score in scores])


def _ready(embeddings: Tensor, measure: Any) -> Tensor:
    """Return embeddings prepared for comparison; NaN rows become zero vectors and match nothing."""
    if not torch.isfinite(embeddings).all():
        embeddings = torch.nan_to_num(embeddings, posinf=0.0, neginf=0.0)
    ready: Tensor = measure.maybe_normalize(embeddings)
    return ready


def _cat(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate the embeddings and groups of all batches, in the list too."""
    embeddings, groups = zip(*batches, strict=True)
    batches[:] = [(torch.cat(embeddings), torch.cat(groups))]
    return batches[0]
