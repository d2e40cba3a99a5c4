"""Contradictions in a sample table: one content under two labels, or in both training and held-out splits."""

from __future__ import annotations

import numpy as np

from pipeline.data.table import SampleTable

_NAMED = 3
_LABELS = ("label", "tags", "belongs")
"""Targets of which a content should have one."""


def remarks(table: SampleTable) -> list[str]:
    """Return a sentence about each kind of repeated content (equal keys); of pairs, whole pairs are compared."""
    rows, keys = _of_pairs(table) if {"pair", "role"} <= table.targets.keys() else (np.arange(len(table)), table.keys)
    what = "pairs" if len(rows) < len(table) else "contents"
    order, of_order = _repeated(keys)  # those that occur more than once, equal ones side by side
    rows = rows[order]
    lines = []
    for name in [name for name in _LABELS if name in table.targets]:
        labels = _numbered(table.targets[name][rows], in_order=name == "tags")
        differs = _differs(of_order, labels)
        if differs.any():
            which = "pairs are another pair" if what == "pairs" else "samples have the content of another sample"
            named = _named(table, rows[differs], of_order[differs])
            lines.append(f"{int(differs.sum())} {which} under another {name}, first: {named}")
    for split in ("validation", "test"):
        held_out, training = table.split[rows] == split, table.split[rows] == "train"
        both = np.intersect1d(of_order[held_out], of_order[training])
        if both.size:
            inside = np.isin(of_order, both) & (held_out | training)
            named = _named(table, rows[inside], of_order[inside])
            lines.append(f"{both.size} {what} lie in train and in {split}, first: {named}")
    return lines


def _of_pairs(table: SampleTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each pair's anchor, and the keys of both, (n, 32) uint8."""
    pairs, roles = table.targets["pair"], table.targets["role"]
    anchors, positives = (np.flatnonzero(roles == role) for role in ("anchor", "positive"))
    anchors, positives = (rows[np.argsort(pairs[rows], kind="stable")] for rows in (anchors, positives))
    return anchors, np.hstack([table.keys[anchors], table.keys[positives]])


def _repeated(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose key (N, 16 or 32) uint8 occurs more than once, equal ones side by side, with its number."""
    words = np.ascontiguousarray(keys).view(np.uint64)
    order = np.lexsort(words.T[::-1])
    new = np.ones(len(order), bool)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    number = np.cumsum(new) - 1
    often = np.bincount(number, minlength=1)[number] > 1 if len(number) else new
    return order[often], number[often]


def _numbered(labels: np.ndarray, *, in_order: bool) -> np.ndarray:
    """Return a number for each label (n,); the order within a set of labels does not count, that of tags does."""
    if labels.dtype != object:
        return np.unique(labels, return_inverse=True)[1]
    known: dict[tuple[object, ...], int] = {}
    tuples = (tuple(one if in_order else sorted(set(one))) for one in labels.tolist())
    return np.array([known.setdefault(one, len(known)) for one in tuples], np.int64)


def _differs(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (n,) bool: in which rows' group, of equal numbers side by side, labels differ."""
    if not len(groups):
        return np.zeros(0, bool)
    begins = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    several = np.minimum.reduceat(labels, begins) < np.maximum.reduceat(labels, begins)
    return np.repeat(several, np.diff(np.append(begins, len(groups))))


def _named(table: SampleTable, rows: np.ndarray, groups: np.ndarray) -> str:
    """Name the groups of the earliest rows: `cat/1.png = dog/7.png`; equal `groups` (n,) are side by side."""
    begins = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    first = begins[np.argsort(rows[begins], kind="stable")[:_NAMED]]
    members = [rows[begin : begin + _NAMED][groups[begin : begin + _NAMED] == groups[begin]] for begin in first]
    return ", ".join(" = ".join(table.source[row] for row in found.tolist()) for found in members)
