"""Sample key -> segment and row: sorted keys, searched and made distinct at the speed of 64-bit integers.

A key is two big-endian halves. Sorting goes by the high ones, and looks at the low ones only where high ones are equal:
hardly ever for digests, and everywhere, a few times slower, for keys of a user's own that share their beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import MissingKeysError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.store.format.segment_files import read_keys

_BLOCK = 1 << 20
"""Keys that are looked up at a time: what bounds the memory of a search."""


class KeySet:
    """Some keys in ascending order; 20 bytes a key, 24 from two thousand million on."""

    def __init__(self, keys: np.ndarray) -> None:
        """Sort `keys` (n, 16) uint8, among which some may be equal."""
        order, self._high = _sorted(keys)
        self._low = _half(keys, 1)[order].astype(np.uint64)
        self._ties = bool((self._high[1:] == self._high[:-1]).any())
        self._order = order.astype(np.int32) if len(order) < 1 << 31 else order

    def __len__(self) -> int:
        return len(self._high)

    def keys(self) -> np.ndarray:
        """Return the keys (n, 16) uint8 in the order in which they were given."""
        halves = np.empty((len(self), 2), ">u8")
        halves[self._order, 0], halves[self._order, 1] = self._high, self._low
        return halves.view(np.uint8)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return (m,) bool: which of `keys` (m, 16) uint8 are among these."""
        return self.find(keys) >= 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return (m,) int64: where each of `keys` (m, 16) uint8 was first given, -1 where it was not."""
        check_keys(keys)
        places = np.full(len(keys), -1, np.int64)
        for begin in range(0, len(keys) if len(self) else 0, _BLOCK):
            places[begin : begin + _BLOCK] = self._find(keys[begin : begin + _BLOCK])
        return places

    def _find(self, keys: np.ndarray) -> np.ndarray:
        ascending = np.argsort(_half(keys, 0).astype(np.uint64))  # neighbours then are neighbours in memory
        high, low = (_half(keys, half)[ascending].astype(np.uint64) for half in (0, 1))
        place = np.searchsorted(self._high, high)
        if self._ties:
            place = self._find_among_equal(place, np.searchsorted(self._high, high, side="right"), low)
        inside = np.minimum(place, len(self) - 1)
        found = (self._high[inside] == high) & (self._low[inside] == low)
        places = np.empty(len(keys), np.int64)
        places[ascending] = np.where(found, self._order[inside], -1)
        return places

    def _find_among_equal(self, begin: np.ndarray, end: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Halve each stretch of equal high halves until it begins with a low half that is not below the wanted."""
        while (unsure := np.flatnonzero(begin < end)).size:
            middle = (begin[unsure] + end[unsure]) // 2
            below = self._low[middle] < low[unsure]
            begin[unsure[below]] = middle[below] + 1
            end[unsure[~below]] = middle[~below]
        return begin


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

    def __getitem__(self, chosen: np.ndarray) -> "Rows":
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
        """Return the places of `keys` (n, 16) uint8, in their order; raises MissingKeysError if one has none."""
        place = self.find(keys)
        absent = np.flatnonzero(place < 0)
        if len(absent):
            named = ", ".join(keys[i].tobytes().hex() for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise MissingKeysError(f"{len(absent)} of {len(keys)} samples were never encoded: {named}; encode them")
        segment = np.searchsorted(self._starts, place, side="right") - 1
        return Rows(self.segments, segment.astype(np.int32), place - self._starts[segment])


def first_rows(keys: np.ndarray) -> np.ndarray:
    """Return the rows (m,) int64, ascending, of `keys` (n, 16) uint8 that no earlier row equals."""
    return np.flatnonzero(KeySet(keys).find(keys) == np.arange(len(keys)))


def _sorted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order (n,) int64 that sorts `keys`, equal ones as they come, and their high halves in it."""
    check_keys(keys)
    high = _half(keys, 0).astype(np.uint64)
    order = np.argsort(high)
    high = high[order]
    same = high[1:] == high[:-1]
    tied = np.zeros(len(keys), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    if tied.any():
        among = order[tied]
        order[tied] = among[np.lexsort((among, _half(keys, 1)[among], high[tied]))]
    return order, high


def _half(keys: np.ndarray, half: int) -> np.ndarray:
    """View one half of each key (n, 16) uint8 as a number, in the order of bytes."""
    return np.ascontiguousarray(keys).view(">u8")[:, half]


def check_keys(keys: np.ndarray) -> None:
    """Raise StoreError unless `keys` are (n, 16) uint8."""
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise StoreError(f"keys are {keys.dtype} of shape {keys.shape}; expected uint8 of shape (n, {KEY_BYTES})")
