"""Scores of an embedding: for each query, are the samples that belong to it the nearest?

They are computed some queries at a time, so that memory is that of the embeddings, twice, and what `MAX_SIMILARITIES`
allows. Of references that are equally near, those that do not belong come first: an embedding in which all samples are
one scores nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks.config import retrieval_scores
from pipeline.tasks.losses import DISTANCES
from pipeline.tasks.review import Mistake, Neighbour, points, review, worst
from pipeline.tasks.scores import Metrics

# Q query, R reference, D channel, M member (reference of the query's group), K nearest

MAX_SIMILARITIES = 1 << 24
"""Similarities held at a time, 64 MB; peak memory is 2 times that, 8 times if half of the samples are one group."""
SHOWN = 4
"""Nearest samples that a review shows of a query."""
NEVER = torch.iinfo(torch.int64).max
EQUAL = 1e-6
"""Similarities that are no further apart count as equal, relative to their size where that is above 1."""


class RetrievalScores(Metrics):
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
        references = _joined(self._references) if self._references else (None, None)
        return rank(*_joined(self._queries), *references, distance=self._distance, precision_at=self._precision_at)


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
    measure = DISTANCES[distance]()
    query_QD, itself = _comparable(query_QD, measure), reference_RD is None
    reference_RD = query_QD if reference_RD is None else _comparable(reference_RD, measure)
    group_R = group_Q if group_R is None else group_R
    order_R = torch.argsort(group_R, stable=True)  # by group: a query's members lie between its begin and its end
    begin_Q, end_Q = (torch.searchsorted(group_R[order_R], group_Q, right=right) for right in (False, True))
    count_Q = end_Q - begin_Q
    relevant_Q = count_Q - 1 if itself else count_Q
    counted = torch.argsort(relevant_Q)  # queries with as many members share their blocks' sizes
    counted = counted[relevant_Q[counted] > 0]
    names = retrieval_scores(tuple(precision_at))
    if not len(counted):
        return dict.fromkeys(names, float("nan"))
    sums = torch.zeros(len(names), dtype=torch.float64)
    for chosen in torch.split(counted, max(1, MAX_SIMILARITIES // len(reference_RD))):
        near_QR = measure.compute_mat(query_QD[chosen], reference_RD)
        if not measure.is_inverted:
            near_QR.neg_()
        column_M = torch.arange(int(count_Q[chosen].max()))
        counts_QM = column_M < count_Q[chosen].unsqueeze(1)  # a smaller group is filled up with its first member
        member_QM = order_R[begin_Q[chosen].unsqueeze(1) + torch.where(counts_QM, column_M, 0)]
        if itself:
            counts_QM &= member_QM != chosen.unsqueeze(1)
        sums += _sums(near_QR, member_QM, counts_QM, relevant_Q[chosen], precision_at)
    return dict(zip(names, (sums / len(counted)).tolist(), strict=True))


class RetrievalReview(Metrics):
    """Queries whose nearest sample does not belong to them, with their nearest samples and the nearest that does."""

    def __init__(self, distance: str, label_N: np.ndarray | None) -> None:
        """Compare by `distance`; `label_N` (N,) str are the labels of the rows of the table, None of pairs."""
        super().__init__(())
        self._measure, self._label_N = DISTANCES[distance](), label_N
        self._seen: list[tuple[Tensor, ...]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._seen.append((output, targets["group"], targets["row"], targets.get("role", targets["row"] * 0 - 1)))

    def result(self) -> dict[str, Any]:
        output_ND, group_N, row_N, role_N = (torch.cat(part) for part in zip(*self._seen, strict=True))
        output_ND = _comparable(output_ND, self._measure)
        query_N, reference_N = role_N < 1, role_N != 0  # of pairs, anchors among positives; else each among all
        references = output_ND[reference_N], group_N[reference_N], row_N[reference_N]
        best, mistakes, wrong = list[Tensor](), list[Mistake](), 0
        for chosen in torch.split(torch.nonzero(query_N)[:, 0], max(1, MAX_SIMILARITIES // len(references[0]))):
            found = self._block(output_ND[chosen], group_N[chosen], row_N[chosen], references)
            best.append(found[0])
            wrong += int((found[0][:, 1] >= found[0][:, 0]).sum())
            mistakes += found[1]
        best_Q2 = torch.cat(best).numpy()
        titles = ("similarity of the nearest that belongs", "similarity of the nearest that does not")
        return review(
            len(best_Q2),
            wrong,
            mistakes,
            "similarity of the nearest wrong sample, less that of the nearest right one",
            unit="queries",
            **({"points": points(titles, *best_Q2.T)} if len(best_Q2) else {}),
        )

    def _block(
        self, query_QD: Tensor, group_Q: Tensor, row_Q: Tensor, references: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, list[Mistake]]:
        """Return the similarities of the nearest that belongs and that does not, (q, 2), and the worst mistakes.

        Queries that nothing belongs to, or everything, do not count.
        """
        reference_RD, group_R, row_R = references
        near_QR = self._measure.compute_mat(query_QD, reference_RD)
        if not self._measure.is_inverted:
            near_QR.neg_()
        near_QR.masked_fill_(row_Q[:, None] == row_R, float("-inf"))
        belongs_QR = group_Q[:, None] == group_R
        right_Q, place_Q = near_QR.masked_fill(~belongs_QR, float("-inf")).max(1)
        wrong_Q = near_QR.masked_fill(belongs_QR, float("-inf")).amax(1)
        counted = right_Q.isfinite() & wrong_Q.isfinite()
        nearest_QK = near_QR.topk(min(SHOWN, near_QR.shape[1])).indices
        mistakes = []
        for q in worst((wrong_Q - right_Q).numpy(), (counted & (wrong_Q >= right_Q)).numpy()):
            shown = list(dict.fromkeys([*nearest_QK[q].tolist(), int(place_Q[q])]))
            shown = [place for place in shown if near_QR[q, place].isfinite()]
            neighbours = [Neighbour(int(row_R[r]), float(near_QR[q, r]), bool(belongs_QR[q, r])) for r in shown]
            expected, found = "its partner", "another sample"
            if self._label_N is not None:
                expected, found = (str(self._label_N[row]) for row in (int(row_Q[q]), neighbours[0].row))
            severity = float(wrong_Q[q] - right_Q[q])
            mistakes.append(Mistake(int(row_Q[q]), expected, found, severity, neighbours=neighbours))
        return torch.stack([right_Q, wrong_Q], dim=1)[counted], mistakes


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


def _comparable(embeddings: Tensor, measure: Any) -> Tensor:
    """Return embeddings prepared for comparison; NaN rows become zero vectors and match nothing."""
    if not torch.isfinite(embeddings).all():
        embeddings = torch.nan_to_num(embeddings, posinf=0.0, neginf=0.0)
    ready: Tensor = measure.maybe_normalize(embeddings)
    return ready


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate the embeddings and groups of all batches, in the list too."""
    embeddings, groups = zip(*batches, strict=True)
    batches[:] = [(torch.cat(embeddings), torch.cat(groups))]
    return batches[0]
