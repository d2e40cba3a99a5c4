"""In-batch negatives, P x K units and retrieval scores against independent computations."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torchmetrics.functional.retrieval import (
    retrieval_precision,
    retrieval_r_precision,
    retrieval_reciprocal_rank,
)

from pipeline.tasks import TaskConfig, open_task
from pipeline.tasks import retrieval as scores
from pipeline.tasks.similarity import draw_groups

pytestmark = pytest.mark.slow

ROLES = torch.tensor([0, 1] * 4)


def embeddings(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def in_batch_loss(output: Tensor, groups: list[int], symmetric: bool = False) -> float:
    task = open_task(TaskConfig(kind="similarity", symmetric=symmetric))
    return float(task.loss(output, {"group": torch.tensor(groups).repeat_interleave(2), "role": ROLES}))


def test_in_batch_negatives_are_cross_entropy_over_scaled_cosines() -> None:
    output = embeddings(8)
    cosines = normalize(output[0::2], dim=1) @ normalize(output[1::2], dim=1).T
    there, back = (cross_entropy(20 * matrix, torch.arange(4)).item() for matrix in (cosines, cosines.T))
    assert in_batch_loss(output, [0, 1, 2, 3]) == pytest.approx(there, rel=1e-4)
    assert in_batch_loss(output, [0, 1, 2, 3], symmetric=True) == pytest.approx((there + back) / 2, rel=1e-4)


def test_pairs_of_one_group_are_no_negatives_of_each_other() -> None:
    output = embeddings(8)
    cosines = 20 * normalize(output[0::2], dim=1) @ normalize(output[1::2], dim=1).T
    same = torch.tensor([0, 0, 1, 2])[:, None] == torch.tensor([0, 0, 1, 2])
    losses = [
        -(cosines[i, j] - torch.logsumexp(torch.cat([cosines[i, j][None], cosines[i][~same[i]]]), 0)).item()
        for i, j in same.nonzero().tolist()
    ]
    assert in_batch_loss(output, [0, 0, 1, 2]) == pytest.approx(np.mean(losses), rel=1e-4)


def reference_scores(similar: Tensor, belongs: Tensor, others: Tensor, ks: tuple[int, ...] = (1,)) -> dict[str, float]:
    """Compute the scores query by query, with torchmetrics."""
    found = []
    for row, mine, rest in zip(similar, belongs, others, strict=True):
        near, right = row[rest] + 2, mine[rest]  # the library takes nothing below 0 as found
        if right.any():
            precisions = [float(retrieval_precision(near, right, top_k=k)) for k in ks]
            rank, r_precision = retrieval_reciprocal_rank(near, right), retrieval_r_precision(near, right)
            found.append([*precisions, float(rank), float(r_precision)])
    names = [*(f"precision_at_{k}" for k in ks), "reciprocal_rank", "r_precision"]
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


@pytest.mark.parametrize("at_a_time", [1, 50, 1 << 20])
def test_scores_follow_their_definitions_however_they_are_cut(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(scores, "MAX_SIMILARITIES", at_a_time)
    ks = (1, 3, 60)
    vectors, groups = normalize(embeddings(80), dim=1), torch.arange(80) % 9 * (torch.arange(80) % 3)
    groups[0] = 99  # a query that nothing belongs to
    similar, belongs = vectors @ vectors.T, groups[:, None] == groups
    expected = reference_scores(similar, belongs, ~torch.eye(80, dtype=torch.bool), ks)
    assert scores.rank(3 * vectors, groups, precision_at=ks) == pytest.approx(expected, abs=1e-6)
    queries, references = slice(0, 30), slice(30, 80)
    all_of_them = torch.ones(30, 50, dtype=torch.bool)
    expected = reference_scores(similar[queries, references], belongs[queries, references], all_of_them, ks)
    found = scores.rank(vectors[queries], groups[queries], 2 * vectors[references], groups[references], precision_at=ks)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "theirs"),
    [
        ("cosine", distances.CosineSimilarity()),
        ("dot", distances.DotProductSimilarity(normalize_embeddings=False)),
        ("euclidean", distances.LpDistance(normalize_embeddings=False)),
        ("manhattan", distances.LpDistance(normalize_embeddings=False, p=1)),
    ],
)
def test_scores_are_those_of_the_library(distance: str, theirs: distances.BaseDistance) -> None:
    vectors, groups = embeddings(300, seed=4), torch.arange(300) % 20
    names = ("precision_at_1", "mean_reciprocal_rank", "r_precision")
    calculator = AccuracyCalculator(include=names, device=torch.device("cpu"), knn_func=CustomKNN(theirs))
    expected = [calculator.get_accuracy(vectors, groups)[name] for name in names]
    assert list(scores.rank(vectors, groups, distance=distance).values()) == pytest.approx(expected, abs=1e-6)


def test_of_what_is_equally_near_the_wrong_comes_first() -> None:
    groups = torch.arange(12) % 3
    collapsed = scores.rank(torch.ones(12, 4) + 1e-8 * embeddings(12)[:, :4], groups, precision_at=(1, 9))
    assert collapsed["precision_at_1"] == collapsed["r_precision"] == 0
    assert collapsed["reciprocal_rank"] == pytest.approx(1 / 9)  # eight others are wrong
    assert collapsed["precision_at_9"] == pytest.approx(1 / 9)
    no_numbers = scores.rank(torch.full((12, 4), float("nan")), groups)
    assert no_numbers["precision_at_1"] == 0


def test_scores_over_batches_are_those_of_all_at_once() -> None:
    output, groups = embeddings(30), torch.arange(15).repeat_interleave(2) % 6
    roles = torch.tensor([0, 1] * 15)
    whole, parts = scores.RetrievalScores(), scores.RetrievalScores()
    whole.update(output, {"group": groups, "role": roles})
    for part in torch.arange(30).split(7):
        parts.update(output[part] * 3, {"group": groups[part], "role": roles[part]})
    assert parts.compute() == pytest.approx(whole.compute())
    assert parts.compute() == pytest.approx(whole.compute())  # a second time


def test_no_query_with_a_match_gives_no_number() -> None:
    found = scores.rank(embeddings(3), torch.arange(3), embeddings(3), torch.arange(3) + 9)
    assert all(np.isnan(value) for value in found.values())


def test_memory_of_scores_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is held at a time is a few times `MAX_SIMILARITIES`, with groups large and small."""
    monkeypatch.setattr(scores, "MAX_SIMILARITIES", 1 << 14)
    count = 2000
    for groups in (torch.arange(count) % 2, torch.arange(count) // 2):
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            scores.rank(embeddings(count), groups)
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert largest <= 8 * (1 << 14) + 8 * count * 5


def test_groups_are_drawn_whole_and_anew() -> None:
    rows = np.arange(100, 123)
    labels = np.array([0] * 10 + [1] * 4 + [2] * 3 + [3] * 1 + [4] * 5)
    units = draw_groups(rows, labels, 4, seed=3, epoch=0)
    assert [len(unit) for unit in units] == [4, 4, 4, 4, 3, 1, 4, 4]
    for unit in units:
        assert len(set(labels[unit - 100].tolist())) == 1
        assert len(set(unit.tolist())) == len(unit)
    assert np.array_equal(np.unique(np.concatenate(units)), rows)
    again, next_epoch = (draw_groups(rows, labels, 4, seed=3, epoch=epoch) for epoch in (0, 1))
    assert all(np.array_equal(one, other) for one, other in zip(units, again, strict=True))
    assert any(not np.array_equal(one, other) for one, other in zip(units, next_epoch, strict=True))
