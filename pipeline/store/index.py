"""Where each sample lies: sorted keys, 28 bytes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import MissingKeysError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.format import read_keys


@dataclass(frozen=True)
class Rows:
    """Places of n samples; indexed with an array it gives the places of those.

    Attributes:
        segments: ids of the segments that `segment` counts.
        segment: (n,) int32.
        row: (n,) int64, within the segment.
    """

    segments: tuple[str, ...]
    segment: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.segment)

    def __getitem__(self, chosen: np.ndarray) -> Rows:
        return Rows(self.segments, self.segment[chosen], self.row[chosen])


class KeyIndex:
    """The samples of some segments; of a sample that several hold, the first one's is taken."""

    def __init__(self, root: Path, segments: Sequence[str]) -> None:
        """Read the keys of every segment.

        Raises:
            CorruptStoreError: the keys of a segment cannot be read, or are not those it was named after.
        """
        parts = [read_keys(root / segment) for segment in segments]
        sizes = np.array([len(part) for part in parts], np.int64)
        self.keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts])
        order = np.argsort(_scalars(self.keys), kind="stable")
        self._sorted = _scalars(self.keys)[order]
        starts = np.cumsum(sizes) - sizes
        segment = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)[order]
        self._rows = Rows(tuple(segments), segment, order - starts[segment])

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which of `keys` (n, 16) uint8 no segment holds."""
        return ~self._find(keys)[1]

    def rows(self, keys: np.ndarray) -> Rows:
        """Return the places of `keys` (n, 16) uint8, in their order.

        Raises:
            MissingKeysError: no segment holds some of them; the message names up to five.
        """
        place, found = self._find(keys)
        if not found.all():
            absent = np.flatnonzero(~found)
            named = ", ".join(keys[i].tobytes().hex() for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise MissingKeysError(
                f"{len(absent)} of {len(keys)} samples were never encoded: {named}; run the encode stage"
            )
        return self._rows[place]

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = _scalars(keys)
        place = np.searchsorted(self._sorted, wanted)
        found = place < len(self._sorted)
        found[found] = self._sorted[place[found]] == wanted[found]
        return place, found


def _scalars(keys: np.ndarray) -> np.ndarray:
    """View (n, 16) uint8 as (n,) byte strings, which numpy sorts and compares. All 16 bytes count, NULs included."""
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise StoreError(f"keys are {keys.dtype} of shape {keys.shape}; expected uint8 of shape (n, {KEY_BYTES})")
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)
