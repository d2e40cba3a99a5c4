"""The stores of one cut read as one: the plain store, and a store for each augmented view of the training samples.

    <cut>/recipe.json, <cut>/<segment id>/                  the held-out samples, plain
    <cut>/view-0/recipe.json, <cut>/view-0/<segment id>/    the training samples in one view

A view is a store like any other, with its own recipe: a further view is encoded separately, and a view that is no
longer used stays untouched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.data import SampleTable
from pipeline.store import KeySet, Rows, Store

VIEWED = "train"
"""The split whose samples are augmented; the other splits are evaluated without augmentation."""


def view_name(view: int) -> str:
    """Return the name of a view, in its recipe and as a folder."""
    return f"view-{view}"


def rows_by_view(keys: np.ndarray, table: SampleTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a data set that are stored plain and those stored in augmented views.

    `keys` (N, 16) uint8 are those of all rows. Equal contents in several splits are stored once for each.
    """
    augmented = table.split == VIEWED
    held_out, training = (KeySet(table.keys[chosen]).contains(keys) for chosen in (~augmented, augmented))
    return np.flatnonzero(held_out), np.flatnonzero(training)


def split_numbers(keys: np.ndarray, table: SampleTable) -> np.ndarray:
    """Return the number of the split of each row of a data set, (N,) int64; `keys` (N, 16) uint8 are those of all rows.

    A segment holds samples of one split, so that an epoch reads only segments of the splits it needs. Equal contents
    in several splits count for the first of them.
    """
    numbers: np.ndarray = np.unique(table.split, return_inverse=True)[1][KeySet(table.keys).find(keys)]
    return numbers


@dataclass(frozen=True)
class Views:
    """V views of the N samples of a table; V is 1 where there is only the plain store."""

    plain: Store
    augmented: Sequence[Store]
    """One store for each view."""
    keys: np.ndarray
    """Sample keys, (N, 16) uint8."""
    in_views: np.ndarray
    """Which samples are in the augmented views, (N,) bool; the others are in the plain store and the same in all views.
    """

    @classmethod
    def of(cls, plain: Store, augmented: Sequence[Store], table: SampleTable) -> "Views":
        """Return the stores of the samples in `table`."""
        return cls(plain, augmented, table.keys, (table.split == VIEWED) & bool(augmented))

    @property
    def path(self) -> Path:
        """The folder that contains the segments of all places."""
        return self.plain.path

    @property
    def count(self) -> int:
        """V."""
        return max(1, len(self.augmented))

    @property
    def stores(self) -> list[Store]:
        """The plain store and those of the augmented views."""
        return [self.plain, *self.augmented]

    @cached_property
    def places(self) -> Rows:
        """Places of the samples in each view, V * N, view by view; the keys are looked up once.

        Raises:
            MissingKeysError: some samples were never encoded; the message names up to five.
        """
        if not self.augmented:
            return self.plain.rows(self.keys)
        segment = np.empty((self.count, len(self.keys)), np.int32)
        row = np.empty((self.count, len(self.keys)), np.int64)
        held_out = self.plain.rows(self.keys[~self.in_views])
        segment[:, ~self.in_views], row[:, ~self.in_views] = held_out.segment, held_out.row
        segments = list(held_out.segments)
        for view, store in enumerate(self.augmented):
            places = store.rows(self.keys[self.in_views])
            segment[view, self.in_views], row[view, self.in_views] = places.segment + len(segments), places.row
            segments += [f"{store.path.name}/{name}" for name in places.segments]
        return Rows(tuple(segments), segment.reshape(-1), row.reshape(-1))

    def first_places(self, rows: np.ndarray | None = None) -> Rows:
        """Return the places of all samples, or of `rows` (n,) int64, in the first view."""
        return self.places[np.arange(len(self.keys)) if rows is None else rows]
