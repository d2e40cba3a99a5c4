"""Units of work: samples that are computed, committed and skipped together, and what comes of them."""

import itertools
import operator
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.source import Source
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample, name_of
from pipeline.store import KeySet, Store, first_rows

BLOCK = 1 << 20
"""Number of keys looked up at a time."""


@dataclass(frozen=True)
class Part:
    """One unit in one view, computed and committed together."""

    rows: np.ndarray
    """Row numbers in the data set, (n,) int64."""
    keys: np.ndarray
    """Their keys, (n, 16) uint8."""
    view: int
    """Number of the view."""
    cuts: tuple[int, ...]
    """Numbers of the cuts whose stores lack these samples in this view."""


@dataclass(frozen=True)
class Unit:
    """Samples that become one segment in each of some stores."""

    rows: np.ndarray
    """Row numbers in the data set, (n,) int64."""
    keys: np.ndarray
    """Their keys, (n, 16) uint8."""
    stores: tuple[tuple[int, int], ...]
    """Numbers of the view and of the cut of each store that lacks these samples, ascending."""

    @property
    def parts(self) -> list[Part]:
        """The unit divided by view."""
        by_view = itertools.groupby(self.stores, operator.itemgetter(0))
        return [Part(self.rows, self.keys, view, tuple(cut for _, cut in at)) for view, at in by_view]


def plan(
    keys: np.ndarray,
    wanted: Sequence[np.ndarray],
    stores: Sequence[Sequence[Store]],
    size: int,
    groups: np.ndarray | None = None,
) -> list[Unit]:
    """Return the units that encode the rows `wanted[view]` missing in `stores[view][cut]`, in data-set order.

    `keys` (N, 16) uint8 are those of all rows; `wanted[view]` (n,) int64 are row numbers. A unit has rows of one group
    only, where `groups` (N,) int64 gives the group of each row. Identical samples are encoded once. The missing rows of
    a store are divided into units of `size`; where whole units are missing, the division of the others stays the same,
    so that an interrupted run continues with the same units. Samples that were set aside in a committed unit get units
    of their own: the reason may have been temporary. What `check_rows` refuses raises TypeError.
    """
    check_rows(wanted)
    lacked: dict[bytes, tuple[np.ndarray, list[tuple[int, int]]]] = {}
    for view, (of_all, of_view) in enumerate(zip(wanted, stores, strict=True)):
        own = None if groups is None else groups[of_all]
        grouped = [of_all] if own is None else [of_all[own == number] for number in np.unique(own)]
        for rows, (cut, store) in itertools.product(grouped, enumerate(of_view)):
            distinct = rows[first_rows(keys[rows])]
            lacking = lacking_rows(keys, distinct, store)
            again = KeySet(store.set_aside()).contains(keys[lacking])
            for waiting in (lacking[~again], lacking[again]):
                for begin in range(0, len(waiting), size):
                    unit = waiting[begin : begin + size]
                    lacked.setdefault(unit.tobytes(), (unit, []))[1].append((view, cut))
    return sorted(
        (Unit(rows, keys[rows], tuple(places)) for rows, places in lacked.values()),
        key=lambda unit: (unit.rows[0], unit.stores),
    )


def check_rows(wanted: Sequence[object]) -> None:
    """Raise TypeError, which names the view, unless there is one array of row numbers for each view."""
    for view, rows in enumerate(wanted):
        if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.kind not in "iu":
            found = f"{rows.ndim} axes of {rows.dtype}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise TypeError(f"wanted[{view}] is {found}; give the row numbers of this view, one array (n,) of integers")


def lacking_rows(keys: np.ndarray, rows: np.ndarray, store: Store) -> np.ndarray:
    """Return those of `rows` (n,) int64 that `store` lacks; `keys` (N, 16) uint8 are those of all rows."""
    # In blocks: a copy of all keys would be the largest thing here.
    blocks = np.array_split(rows, len(rows) // BLOCK + 1)
    return np.concatenate([block[store.missing(keys[block])] for block in blocks])


class UnitBuffer:
    """The tensors of one unit at one cut, filled batch by batch in any order, given back in the unit's order."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.place = {row: i for i, row in enumerate(rows.tolist())}
        self.whole: dict[str, Tensor] = {}
        self.single: dict[str, list[Tensor | None]] = {}
        self.infinite: set[int] = set()

    def put(self, rows: np.ndarray, tensors: dict[str, Tensor | list[Tensor]]) -> None:
        """Add the tensors of `rows`: (len(rows), ...) if all have one shape, else one tensor per row."""
        places = [self.place[row] for row in rows.tolist()]
        for name, tensor in tensors.items():
            if name.startswith("state."):
                self.infinite.update(int(rows[i]) for i in _infinite(tensor))
            if isinstance(tensor, Tensor) and name not in self.whole and name not in self.single:
                self.whole[name] = torch.empty((len(self.rows), *tensor.shape[1:]), dtype=tensor.dtype)
            whole = self.whole.get(name)
            if whole is not None and isinstance(tensor, Tensor) and whole.shape[1:] == tensor.shape[1:]:
                whole[places] = tensor.to("cpu")
                continue
            if name not in self.single:  # from here on, shapes differ
                self.single[name] = list(self.whole.pop(name)) if name in self.whole else [None] * len(self.rows)
            for place, one in zip(places, tensor, strict=True):
                self.single[name][place] = one.to("cpu", copy=True)

    def finish(self, dropped: set[int]) -> tuple[np.ndarray, dict[str, Tensor | list[Tensor]]]:
        """Return the rows that are not `dropped`, in the unit's order, and their tensors by name."""
        kept = [i for i, row in enumerate(self.rows.tolist()) if row not in dropped]
        everything = len(kept) == len(self.rows)
        tensors: dict[str, Tensor | list[Tensor]] = {}
        for name, tensor in self.whole.items():
            tensors[name] = tensor if everything else tensor[kept]
        for name, single in self.single.items():
            tensors[name] = [one for i in kept if (one := single[i]) is not None]
        return self.rows[kept], tensors


def _infinite(tensor: Tensor | list[Tensor]) -> list[int]:
    """Return the indices of the samples with a NaN or an infinity."""
    if isinstance(tensor, Tensor) and (not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum()))):
        return []
    return [i for i, one in enumerate(tensor) if one.is_floating_point() and not bool(torch.isfinite(one).all())]


@dataclass
class EncodeCosts:
    """Seconds spent, added up over the samples of a run."""

    samples: int = 0
    positions: int = 0
    """Tokens, or what `ragged.length` counts, of the samples of unequal length."""
    padded: int = 0
    """The same with the padding of their batches, for the last cut."""
    elapsed: float = 0.0
    """Time of the whole run, in which the steps overlap."""
    reading: float = 0.0
    """Time that the prefix waited for samples."""
    forward: dict[int, float] = field(default_factory=dict)
    """Per cut, the forward time from the inputs to the cut."""
    forward_samples: dict[int, int] = field(default_factory=dict)
    writing: dict[int, float] = field(default_factory=dict)

    def add(self, other: "EncodeCosts") -> None:
        """Add the costs of `other` to these."""
        for name in ("samples", "positions", "padded", "elapsed", "reading"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("forward", "forward_samples", "writing"):
            mine = getattr(self, name)
            for cut, value in getattr(other, name).items():
                mine[cut] = mine.get(cut, 0) + value

    def of(self, cut: int) -> dict[str, Any]:
        """Return the number of samples encoded for `cut`, and the seconds per sample of each step."""
        count = self.forward_samples.get(cut, 0)
        if not count:
            return {"samples": 0, "seconds_per_sample": {}}
        read, forward = self.reading / self.samples, self.forward[cut] / count
        write = self.writing.get(cut, 0.0) / count
        return {"samples": count, "seconds_per_sample": {"read": read, "forward": forward, "write": write}}


@dataclass
class Outcome:
    """The result of one part of a unit, and its costs."""

    part: Part
    bad: list[BadSample] = field(default_factory=list)
    """Samples of the part that were set aside."""
    cut_off: list[int] = field(default_factory=list)
    """Number of tokens truncated, for each text that is too long."""
    promoted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Per cut, the state tensors that left the range of the requested type and have a wider one."""
    costs: EncodeCosts = field(default_factory=EncodeCosts)


@dataclass
class EncodeResult:
    """The result of encoding the samples of one encoder."""

    keyed: KeyedSamples
    """The data set; its bad samples include those that have no state."""
    new: list[int]
    """Samples encoded for each cut."""
    promoted: list[set[str]]
    """Per cut, the state tensors that left the range of the requested type in some segment, and have a wider one there.
    """
    cut_off: list[int] = field(default_factory=list)
    """Number of tokens truncated, for each encoded text that is too long."""
    costs: EncodeCosts = field(default_factory=EncodeCosts)

    @classmethod
    def empty(cls, keyed: KeyedSamples, cuts: int) -> "EncodeResult":
        """Return the result of encoding nothing for so many `cuts`."""
        return cls(keyed, [0] * cuts, [set() for _ in range(cuts)])

    def copy(self) -> Self:
        """Return a copy, which `add` changes without changing this one."""
        keyed = replace(self.keyed, bad=list(self.keyed.bad))
        return replace(
            self,
            keyed=keyed,
            new=list(self.new),
            promoted=[set(names) for names in self.promoted],
            cut_off=list(self.cut_off),
            costs=deepcopy(self.costs),
        )

    def add(self, outcome: Outcome, source: Source) -> None:
        """Add the outcome of one more part; rows of `source` with the contents of its bad samples are bad too."""
        known = {sample.row for sample in self.keyed.bad}
        for sample in outcome.bad:
            alike = self.keyed.selected(np.flatnonzero((self.keyed.keys == self.keyed.keys[sample.row]).all(1)))
            new = [row for row in alike.tolist() if row not in known]
            self.keyed.bad.extend(replace(sample, row=row, source=name_of(source, row)) for row in new)
        for cut in outcome.part.cuts:
            self.new[cut] += len(outcome.part.rows) - len(outcome.bad)
            self.promoted[cut].update(outcome.promoted.get(cut, ()))
        self.cut_off += outcome.cut_off
        self.costs.add(outcome.costs)
