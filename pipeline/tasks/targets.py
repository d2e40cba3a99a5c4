"""What a task reads of a sample table, and the numeric targets it makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

from pipeline.errors import DataError, first_few

IGNORED = -100
"""A target that losses ignore (`ignore_index` of torch)."""


@dataclass(frozen=True)
class Ragged:
    """Lists of integers of different lengths, one for each of N rows; batches are padded with `IGNORED`."""

    values: np.ndarray
    """The values of all rows, concatenated, (V,) int64."""
    offsets: np.ndarray
    """Start of each row in `values`, and the end of the last, (N + 1,) int64."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Self:
        """Return the numbers of `rows`."""
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        return cls(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return `rows` (B,) as (B, W), W the longest of them."""
        begins = self.offsets[rows]
        lengths = self.offsets[rows + 1] - begins
        places = np.arange(lengths.max(initial=0))
        inside = places < lengths[:, None]
        padded = np.full(inside.shape, IGNORED, np.int64)
        padded[inside] = self.values[(begins[:, None] + places)[inside]]
        return padded


Prepared: TypeAlias = np.ndarray | Ragged
"""A numeric target of all rows of a table."""


class Table(Protocol):
    """The part of a sample table that a task reads: N rows."""

    @property
    def split(self) -> np.ndarray:
        """Return the split of each row, (N,) str."""

    @property
    def targets(self) -> Mapping[str, np.ndarray]:
        """Return the target columns, each (N,); of dtype object where each entry is a list."""


def column(table: Table, name: str, task: str) -> np.ndarray:
    """Return a target column; raises DataError if the sample table lacks it."""
    if name not in table.targets:
        known = ", ".join(table.targets) or "none"
        raise DataError(f"task {task} needs the target {name}; the samples have {known}; set another task or source")
    return table.targets[name]


def refuse_unseen(unseen: Collection[Any], what: str, samples: str = "held-out samples") -> None:
    """Raise DataError if `samples` have labels, `unseen`, that no training sample has; `what` says what they are."""
    if unseen:
        raise DataError(
            f"{samples} have {len(unseen)} {what} that training lacks ({first_few(map(repr, sorted(unseen)))}); "
            "add training samples of them, leave them out, or set another data.seed or data.validation"
        )
