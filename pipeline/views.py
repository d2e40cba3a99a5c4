"""The stores of one cut read as one: the plain one, and one for each augmented view of the training samples.

    <cut>/recipe.json, <cut>/<segment id>/                  the held-out samples, plain
    <cut>/view-0/recipe.json, <cut>/view-0/<segment id>/    the training samples in one view

A view is a store like any other, with a recipe of its own: a further view is encoded by itself, and a view that is not
asked for any more lies there untouched until it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import SampleTable
from pipeline.store import KeySet, Rows, Store

VIEWED = "train"
"""The split whose samples are augmented: what is evaluated on looks as it is."""


def view_name(view: int) -> str:
    """Return what a view is called, in its recipe and as a folder."""
    return f"view-{view}"


def rows_by_view(keys: np.ndarray, table: SampleTable) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows of a data set are stored plain, and which in augmented views; `keys` (N, 16) uint8 are all its.

    A content that stands in several splits is stored for each.
    """
    augmented = table.split == VIEWED
    held_out, training = (KeySet(table.keys[chosen]).contains(keys) for chosen in (~augmented, augmented))
    return np.flatnonzero(held_out), np.flatnonzero(training)


def split_numbers(keys: np.ndarray, table: SampleTable) -> np.ndarray:
    """Return a number (N,) int64 for the split of each row of a data set; `keys` (N, 16) uint8 are those of all rows.

    Segments hold samples of one split: an epoch then reads those of the splits that it needs, whole, and no others. Of
    a content that stands in several splits, the first one's counts.
    """
    numbers: np.ndarray = np.unique(table.split, return_inverse=True)[1][KeySet(table.keys).find(keys)]
    return numbers


@dataclass(frozen=True)
class Views:
    """V views of N samples; V is 1 where there is the plain store alone."""

    plain: Store
    augmented: Sequence[Store]
    """One store for each view."""
    in_views: np.ndarray
    """Which samples lie in the augmented views, (N,) bool; the others lie in the plain store, and look alike in every
    view."""

    @classmethod
    def of(cls, plain: Store, augmented: Sequence[Store], table: SampleTable) -> Views:
        """Return the stores of the samples in `table`."""
        return cls(plain, augmented, (table.split == VIEWED) & bool(augmented))

    @property
    def path(self) -> Path:
        """The folder that the segments of all places lie in."""
        return self.plain.path

    @property
    def count(self) -> int:
        """V."""
        return max(1, len(self.augmented))

    @property
    def stores(self) -> list[Store]:
        """Return the plain store and those of the augmented views."""
        return [self.plain, *self.augmented]

    def rows(self, keys: np.ndarray) -> Rows:
        """Return where samples lie in each view, V * N places, view by view; `keys` (N, 16) uint8 are all N of them.

        Raises:
            MissingKeysError: some were never encoded; the message names up to five.
        """
        if not self.augmented:
            return self.plain.rows(keys)
        segment = np.empty((self.count, len(keys)), np.int32)
        row = np.empty((self.count, len(keys)), np.int64)
        held_out = self.plain.rows(keys[~self.in_views])
        segment[:, ~self.in_views], row[:, ~self.in_views] = held_out.segment, held_out.row
        segments = list(held_out.segments)
        for view, store in enumerate(self.augmented):
            places = store.rows(keys[self.in_views])
            segment[view, self.in_views], row[view, self.in_views] = places.segment + len(segments), places.row
            segments += [f"{store.path.name}/{name}" for name in places.segments]
        return Rows(tuple(segments), segment.reshape(-1), row.reshape(-1))
