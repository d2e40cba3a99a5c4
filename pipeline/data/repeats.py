"""Contradictions in a sample table: one content under two labels, or in both training and held-out splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.table import SampleTable

if TYPE_CHECKING:
    import pandas as pd

_NAMED = 3
_LABELS = ("label", "tags", "belongs")
"""Targets of which a content should have one."""


def remarks(table: SampleTable) -> list[str]:
    """Return a sentence about each kind of repeated content (equal keys); of pairs, whole pairs are compared."""
    of_pairs = {"pair", "role"} <= table.targets.keys()
    what = "pairs" if of_pairs else "contents"
    which = "pairs are another pair" if of_pairs else "samples have the content of another sample"
    repeated = _repeated(table, of_pairs=of_pairs)
    rows, lines = repeated.index.to_numpy(), []
    for name in [name for name in _LABELS if name in table.targets]:
        labels = [
            str(sorted(set(label)) if isinstance(label, list) and name != "tags" else label)  # tags alone have an order
            for label in table.targets[name][rows].tolist()
        ]
        kinds = repeated.assign(label=labels).groupby("content")["label"].transform("nunique")
        differs = repeated[kinds > 1]
        if len(differs):
            lines.append(f"{len(differs)} {which} under another {name}, first: {_named(table, differs)}")
    for split in ("validation", "test"):
        held_out, training = (repeated[table.split[rows] == name] for name in (split, "train"))
        both = np.intersect1d(held_out["content"], training["content"])
        if both.size:
            inside = repeated[repeated["content"].isin(both) & np.isin(table.split[rows], (split, "train"))]
            lines.append(f"{both.size} {what} lie in train and in {split}, first: {_named(table, inside)}")
    return lines


def _repeated(table: SampleTable, *, of_pairs: bool) -> pd.DataFrame:
    """Return the column `content`, a number for equal keys, of the rows (of pairs, the anchors') that share theirs."""
    import pandas as pd  # noqa: PLC0415  (slow to import)

    rows, keys = np.arange(len(table)), table.keys
    if of_pairs:
        pairs, roles = table.targets["pair"], table.targets["role"]
        anchors, positives = (np.flatnonzero(roles == role) for role in ("anchor", "positive"))
        rows, positives = (found[np.argsort(pairs[found], kind="stable")] for found in (anchors, positives))
        keys = np.hstack([keys[rows], keys[positives]])
    words = pd.DataFrame(np.ascontiguousarray(keys).view(np.uint64), index=rows).sort_index()
    repeated = words[words.duplicated(keep=False)]
    return repeated.groupby(list(words.columns), sort=False).ngroup().to_frame("content")


def _named(table: SampleTable, repeated: pd.DataFrame) -> str:
    """Name the rows of the earliest groups: `cat/1.png = dog/7.png`."""
    first = repeated["content"].unique()[:_NAMED]
    groups = (repeated.index[repeated["content"] == content][:_NAMED] for content in first)
    return ", ".join(" = ".join(table.source[row] for row in rows.tolist()) for rows in groups)
