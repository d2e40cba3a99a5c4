"""The rows, the views and the processes of every step: pure functions of seed, epoch and sizes.

A unit is a set of rows that stay together: one row for classification, anchor and positive for pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

ViewOrder: TypeAlias = Literal["cycle", "random"]

VIEWS = 1
"""Separates the random numbers for views from those for batches, which have the same seed and epoch."""

POOLED_STEPS = 50
"""Number of batches sorted by length together: more save padding, fewer mix better."""


@dataclass(frozen=True)
class Window:
    """Shuffle within a moving set of segments, for a store that exceeds the page cache.

    Attributes:
        groups: (U,) integers; the segment that unit u lies in.
        size: how many groups are mixed at a time. A unit can meet only the units of these groups within a batch,
            and reads stay within as many segments.
    """

    groups: np.ndarray
    size: int


def batches(
    units: Sequence[np.ndarray] | np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    least: int = 1,
    window: Window | None = None,
    lengths: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return the row indices of each batch of this epoch, int64, unit-major; each unit comes exactly once.

    `units` is (U,) rows, (U, R) rows, or U arrays of rows; `batch_size` counts units. The last batch is smaller, or,
    where it would have fewer than `least` units, part of the batch before.
    The shuffle is exact: each permutation is equally likely, unless a `window` limits it, or `lengths` (U,) are given:
    then units of similar length share a batch, picked among those of `POOLED_STEPS` batches in a row.

    Raises:
        ValueError: a size is out of its range.
    """
    _check(1, batch_size=batch_size)
    _check(0, seed=seed, epoch=epoch)
    if window is not None:
        _check(1, **{"window.size": window.size})
    for name, values in (("window.groups", window.groups if window else None), ("lengths", lengths)):
        if values is not None and len(values) != len(units):
            raise ValueError(f"{name} has {len(values)} entries; it must have one for each of the {len(units)} units")
    rng = np.random.default_rng([seed, epoch])
    if not shuffle:
        order = np.arange(len(units))
    elif window is None:
        order = rng.permutation(len(units))
    else:
        order = _windowed(window, rng)
    if shuffle and lengths is not None:
        order = _by_length(order, lengths, batch_size, rng)
    starts = list(range(0, len(order), batch_size))
    if len(starts) > 1 and len(order) - starts[-1] < least:
        starts.pop()
    return [_rows(units, order[start:end]) for start, end in pairwise([*starts, len(order)])]


def shares(count: int, world: int) -> list[np.ndarray]:
    """Return for each of `world` processes the indices of its samples in a batch of `count`, int64.

    Shares are consecutive and as even as possible. With fewer samples than processes, some processes share one: no
    share is empty.
    """
    places = np.array_split(np.arange(count), world)
    return [own if len(own) or not count else np.array([rank % count]) for rank, own in enumerate(places)]


def views(n_rows: int, count: int, *, seed: int, epoch: int, how: ViewOrder) -> np.ndarray:
    """Return which of `count` views of each row this epoch takes, (n_rows,) int64, the same on every rank.

    "cycle" takes view `epoch` mod `count` of all rows; "random" draws one for each row, independent of later rows.

    Raises:
        ValueError: a size is out of its range.
    """
    _check(1, count=count)
    _check(0, seed=seed, epoch=epoch)
    if how == "cycle":
        return np.full(n_rows, epoch % count)
    return np.random.default_rng([seed, epoch, VIEWS]).integers(count, size=n_rows)


def _windowed(window: Window, rng: np.random.Generator) -> np.ndarray:
    """Put the groups in random order, then shuffle the units of `size` consecutive groups together."""
    _, group_of_unit = np.unique(window.groups, return_inverse=True)
    rank_of_group = rng.permutation(group_of_unit.max(initial=-1) + 1)
    window_of_unit = rank_of_group[group_of_unit] // window.size
    order: np.ndarray = np.lexsort([rng.random(len(group_of_unit)), window_of_unit])
    return order


def _by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Sort each pool of an order by length and shuffle its batches; an incomplete batch stays at the end."""
    full = len(order) // batch_size * batch_size
    pools = []
    for begin in range(0, full, POOLED_STEPS * batch_size):
        pool = order[begin : min(full, begin + POOLED_STEPS * batch_size)]
        by_length = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch_size)
        pools.append(rng.permutation(by_length).reshape(-1))
    return np.concatenate([*pools, order[full:]])


def _rows(units: Sequence[np.ndarray] | np.ndarray, chosen: np.ndarray) -> np.ndarray:
    if not isinstance(units, np.ndarray):
        return np.concatenate([units[unit] for unit in chosen]).astype(np.int64, copy=False)
    rows: np.ndarray = units[chosen].reshape(-1).astype(np.int64, copy=False)
    return rows


def _check(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} is {size}; it must be at least {least}")
