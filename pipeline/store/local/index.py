"""Sample key -> segment and row: sorted keys, 20 bytes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import MissingKeysError
from pipeline.keys import KEY_BYTES
from pipeline.store.format.chunks import read_keys
from pipeline.store.format.keyset import KeySet


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

    @property
    def codes(self) -> np.ndarray:
        """One number for each place, (n,) int64, in the order of segments and rows."""
        codes: np.ndarray = (self.segment.astype(np.int64) << 32) + self.row
        return codes

    def __getitem__(self, chosen: np.ndarray) -> Rows:
        return Rows(self.segments, self.segment[chosen], self.row[chosen])


class KeyIndex(KeySet):
    """The samples of some segments; of a sample that several hold, the first one is taken."""

    def __init__(self, root: Path, segments: Sequence[str]) -> None:
        """Read the keys of every segment; raises CorruptStoreError where they are not those it was named after."""
        parts = [read_keys(root / segment) for segment in segments]
        self.segments = tuple(segments)
        self._starts = np.cumsum([0, *map(len, parts)])
        keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts])
        parts.clear()
        super().__init__(keys)

    def rows(self, keys: np.ndarray) -> Rows:
        """Return the places of `keys` (n, 16) uint8, in their order.

        Raises:
            MissingKeysError: no segment holds some of them; the message names up to five.
        """
        place = self.find(keys)
        absent = np.flatnonzero(place < 0)
        if len(absent):
            named = ", ".join(keys[i].tobytes().hex() for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise MissingKeysError(
                f"{len(absent)} of {len(keys)} samples were never encoded: {named}; run the encode stage"
            )
        segment = np.searchsorted(self._starts, place, side="right") - 1
        return Rows(self.segments, segment.astype(np.int32), place - self._starts[segment])
