"""The review of a run: its confusions, scores by class, calibration and worst mistakes, as plain data for a report.

Tasks collect outputs of the validation samples and put their review together from these parts; each is JSON, and each
may be absent. Samples are named by their rows in the sample table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

# N sample, C class

WORST = 20
"""Mistakes that a review names."""
BINS = 10
"""Bins of confidence in a reliability curve."""
MOST_POINTS = 1000
"""Points of a scatter; of more samples, these are evenly spaced in the order of the table."""


@dataclass(frozen=True)
class Mark:
    """A part of a sample: of its words, or of the characters of its last text."""

    begin: int
    end: int
    kind: Literal["right", "missed", "wrong"]
    label: str = ""


@dataclass(frozen=True)
class Neighbour:
    """A sample that an embedding is near to."""

    row: int
    similarity: float
    is_right: bool


@dataclass(frozen=True)
class Mistake:
    """A sample that the run gets wrong."""

    row: int
    expected: str
    predicted: str
    severity: float
    """Larger is worse; the review says what it measures."""
    marks: list[Mark] = field(default_factory=list)
    neighbours: list[Neighbour] = field(default_factory=list)


def review(
    samples: int,
    wrong: int | None,
    mistakes: Sequence[Mistake],
    severity: str,
    *,
    unit: str = "samples",
    **parts: Any,
) -> dict[str, Any]:
    """Return a review as JSON: `mistakes`, worst first, of which `WORST` are kept, and further parts.

    Args:
        samples: number of `unit` that are scored.
        wrong: number of them that are mistakes; None where nothing is quite right.
        mistakes: the worst of them, as `worst` chooses them.
        severity: what the severity of a mistake measures.
        unit: what is scored, in the plural.
        parts: `confusion`, `classes`, `reliability` and `points`, as the functions below return them.
    """
    kept = sorted(mistakes, key=lambda one: (-np.nan_to_num(one.severity), one.row))[:WORST]
    named = {"samples": samples, "unit": unit, "wrong": wrong, "severity": severity}
    return {**named, "mistakes": [asdict(one) for one in kept], **parts}


def worst(severity_N: np.ndarray, is_wrong_N: np.ndarray) -> list[int]:
    """Return the indices of the at most `WORST` most severe of those that are wrong."""
    wrong = np.flatnonzero(is_wrong_N)
    order = np.argsort(-np.nan_to_num(severity_N[wrong]), kind="stable")
    chosen: list[int] = wrong[order[:WORST]].tolist()
    return chosen


def confusion(expected_N: np.ndarray, found_N: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return how often each class was given for each: `labels`, and `counts` [expected, found, count] above 0."""
    pairs, counts = np.unique(np.stack([expected_N, found_N], axis=1), axis=0, return_counts=True)
    return {"labels": list(labels), "counts": np.column_stack([pairs, counts]).tolist()}


def class_scores(
    labels: Sequence[str], hits_C: np.ndarray, expected_C: np.ndarray, found_C: np.ndarray
) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each class, None where there is nothing to divide by, and its samples.

    `hits_C`, `expected_C` and `found_C` count what was right, what was to be found, and what was found.
    """

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    counts = zip(labels, hits_C.tolist(), expected_C.tolist(), found_C.tolist(), strict=True)
    return [
        {
            "class": label,
            "samples": expected,
            "precision": share(hits, found),
            "recall": share(hits, expected),
            "f1": share(2 * hits, expected + found),
        }
        for label, hits, expected, found in counts
    ]


def reliability(probability_N: np.ndarray, is_right_N: np.ndarray) -> list[dict[str, Any]]:
    """Return mean confidence, share that was right, and count, of each bin of confidence with a sample."""
    probability_N = np.nan_to_num(probability_N)
    bin_N = np.minimum((probability_N * BINS).astype(np.int64), BINS - 1)
    return [
        {
            "confidence": float(probability_N[inside].mean()),
            "right": float(is_right_N[inside].mean()),
            "samples": int(inside.sum()),
        }
        for inside in (bin_N == number for number in np.unique(bin_N))
    ]


def points(titles: tuple[str, str], x_N: np.ndarray, y_N: np.ndarray) -> Mapping[str, Any]:
    """Return points to compare with the diagonal, with the titles of the two axes; at most `MOST_POINTS`."""
    chosen = np.unique(np.linspace(0, len(x_N) - 1, min(len(x_N), MOST_POINTS)).astype(np.int64))
    return {"titles": list(titles), "values": np.column_stack([x_N[chosen], y_N[chosen]]).astype(float).tolist()}
