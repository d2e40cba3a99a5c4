"""In-batch negatives, P x K units and retrieval scores against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from pipeline.tasks import TaskConfig, open_task
from pipeline.tasks import retrieval as scores
from pipeline.tasks.similarity import draw_groups

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


def reference_scores(similar: np.ndarray, belongs: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Compute the scores query by query from their definitions."""
    found: list[tuple[float, float, float]] = []
    for row, mine, rest in zip(similar, belongs, others, strict=True):
        hits = mine[rest][np.argsort(-row[rest], kind="stable")]
        if hits.any():
            relevant = int(hits.sum())
            found.append((float(hits[0]), 1 / (1 + int(hits.argmax())), hits[:relevant].mean()))
    return dict(zip(("precision_at_1", "reciprocal_rank", "r_precision"), np.mean(found, axis=0).tolist(), strict=True))


@pytest.mark.parametrize("at_a_time", [1, 50, 1 << 20])
def test_scores_follow_their_definitions_however_they_are_cut(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(scores, "MAX_SIMILARITIES", at_a_time)
    vectors, groups = normalize(embeddings(40), dim=1), torch.arange(40) % 9
    groups[0] = 99  # a query that nothing belongs to
    similar, belongs = (vectors @ vectors.T).numpy(), (groups[:, None] == groups).numpy()
    expected = reference_scores(similar, belongs, ~np.eye(40, dtype=bool))
    assert scores.rank(vectors, groups, vectors, groups, same=True) == pytest.approx(expected, abs=1e-6)
    queries, references = slice(0, 15), slice(15, 40)
    expected = reference_scores(similar[queries, references], belongs[queries, references], np.ones((15, 25), bool))
    found = scores.rank(vectors[queries], groups[queries], vectors[references], groups[references])
    assert found == pytest.approx(expected, abs=1e-6)


def test_scores_over_batches_are_those_of_all_at_once() -> None:
    output, groups = embeddings(30), torch.arange(15).repeat_interleave(2) % 6
    roles = torch.tensor([0, 1] * 15)
    whole, parts = scores.RetrievalScores(), scores.RetrievalScores()
    whole.update(output, {"group": groups, "role": roles})
    for part in torch.arange(30).split(7):
        parts.update(output[part] * 3, {"group": groups[part], "role": roles[part]})
    assert parts.compute() == pytest.approx(whole.compute())


def test_no_query_with_a_match_gives_no_number() -> None:
    found = scores.rank(
        normalize(embeddings(3), dim=1), torch.arange(3), normalize(embeddings(3), dim=1), torch.arange(3) + 9
    )
    assert all(np.isnan(value) for value in found.values())


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
