"""Rows of the sample table -> batches on the training device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import TrainError
from pipeline.split import State
from pipeline.store import EXTRA_PREFIX, INPUT_PREFIX, SHAPE_PREFIX, STATE_PREFIX, ReadAhead, Reader, Resident, Rows
from pipeline.tasks import IGNORED, Prepared, Ragged
from pipeline.train.order import shares

T = TypeVar("T")

Residency: TypeAlias = Literal["auto", "device", "host"]
Order: TypeAlias = Sequence[np.ndarray] | Callable[[int], Sequence[np.ndarray]]
"""The batches of every epoch, or a function of the epoch; a batch is rows of the sample table."""

View: TypeAlias = Callable[[int], np.ndarray]
"""Which view of each row of the sample table an epoch takes, (N,) int64."""

DEVICE_SHARE = 0.5
"""Share of the free device memory that "auto" gives to the store; weights, gradients and optimizer need the rest."""
PREFETCHED = 2


class Stored(Protocol):
    """Where samples lie: a store, or several that hold views of the same samples."""

    @property
    def path(self) -> Path:
        """The folder that the segments lie in."""

    def rows(self, keys: np.ndarray) -> Rows:
        """Return the places of `keys` (N, 16) uint8, in their order, one view after the other where there are several.

        Raises:
            MissingKeysError: some samples were never encoded; the message names up to five.
        """


class Source(Protocol):
    """Where batches are gathered from: memory maps, or the device's own memory."""

    def gather(self, rows: Rows, pad: Mapping[str, float] | None = None, *, pin: bool = False) -> dict[str, Tensor]:
        """Return the tensors of `rows` by name, each (B, ...)."""


@dataclass(frozen=True)
class Batch:
    """B samples on the training device.

    Attributes:
        state: what crosses the cut, each (B, ...) in its stored dtype, padded with 0 on the right where ragged.
        inputs: the suffix's other inputs, each (B, ...); those in floating point have a shape and no values.
        targets: each (B, ...), in the order of the samples; with them the extras that the store has of them.
        rows: (B,) int64, the samples' rows in the sample table; always on the CPU.
        places: for each of several processes, where its samples are among those of the whole step, (B,) int64.
        fill: what targets are padded with, by name, where they are ragged and it is not 0.
    """

    state: State
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    rows: Tensor
    places: Sequence[np.ndarray] = ()
    fill: Mapping[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; from page-locked memory the copy does not wait."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return replace(self, state=moved(self.state), inputs=moved(self.inputs), targets=moved(self.targets))


def place(
    store: Stored,
    keys: np.ndarray,
    device: torch.device,
    residency: Residency = "auto",
    *,
    reader: Reader | None = None,
) -> Source:
    """Choose where the samples `keys` (N, 16) uint8 are gathered from. Loaders of one store may share the result.

    "auto" copies them, in all their views, to an accelerator when they fit in half of its free memory, and else reads
    memory maps.

    Raises:
        MissingKeysError: some samples were never encoded; the message names up to five.
        TrainError: "device" was asked for and there is not enough memory; the message has both sizes.
    """
    reader = reader or Reader(store.path)
    if residency == "host" or device.type == "cpu":
        return reader
    rows = store.rows(keys)
    needed, free = Resident.nbytes(reader, rows), _free_memory(device)
    if residency == "auto" and needed > DEVICE_SHARE * free:
        return reader
    if needed > free:
        raise TrainError(
            f"residency is device; the samples need {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; "
            "set it to auto"
        )
    return Resident(reader, rows, device)


class Loader:
    """The batches of an epoch; can be iterated again and again.

    Within a batch, samples come in the order of the store, state, inputs, targets and rows alike. Of several processes
    each has a loader of its own, which gives its share of every batch.
    """

    def __init__(
        self,
        store: Stored,
        keys: np.ndarray,
        targets: Mapping[str, Prepared],
        batches: Order,
        *,
        view: View | None = None,
        pad: Mapping[str, float] | None = None,
        floats: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        device: torch.device | str = "cpu",
        residency: Residency = "auto",
        prefetch: int | None = None,
        source: Source | None = None,
        read_ahead: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Prepare to load samples of a table; nothing of their states is read yet, unless they go to the device.

        Args:
            store: holds the samples.
            keys: (N, 16) uint8, the key of every row of the sample table.
            targets: numeric, each (N, ...) or ragged, one entry for every row of the table.
            batches: rows of the table for every batch; see `pipeline.train.order`.
            view: which view of each row an epoch takes, of those that `store` has; by default the first one.
            pad: what ragged inputs and extras are padded with, by name; 0 where not given.
            floats: floating-point inputs of which the suffix needs shape (without batch axis) and dtype alone; those
                that the store has shapes of need not be named.
            device: where batches are wanted.
            residency: "device" holds all samples there, "host" none; "auto" decides by the free memory.
            prefetch: batches read ahead by a thread; by default 2 for an accelerator, and none on the CPU, where
                reading ahead takes a core from training.
            source: shared with another loader (its `source`), instead of one made from `keys` and `residency`.
            read_ahead: bytes of segments that may be at hand at a time, those that are read from and those that threads
                bring, whole, before they are asked for; 0 brings none. Worth its while where batches are drawn from a
                few segments at a time and a disk or a network is to be waited for.
            rank: which of the processes this is, of `world` that share out every batch.
            world: how many there are.

        Raises:
            MissingKeysError: some samples were never encoded; the message names up to five.
            TrainError: targets do not fit the table, or there is not enough device memory.
        """
        self.device = torch.device(device)
        self._places = store.rows(keys)
        self._codes = self._places.codes
        self._view: View = view or (lambda epoch: np.zeros(len(keys), np.int64))
        self._targets = {name: _checked_target(name, values, len(keys)) for name, values in targets.items()}
        self._batches = batches
        self._pad = {
            name if name.startswith(EXTRA_PREFIX) else f"{INPUT_PREFIX}{name}": value
            for name, value in (pad or {}).items()
        }
        self._fill = {name: float(IGNORED) for name, values in targets.items() if isinstance(values, Ragged)}
        self._fill |= _with_prefix(self._pad, EXTRA_PREFIX)
        self._rank, self._world = rank, world
        self._floats = dict(floats or {})
        self.source = place(store, keys, self.device, residency) if source is None else source
        on_host = not isinstance(self.source, Resident)
        self._pin = on_host and can_pin(self.device)
        self._prefetch = (PREFETCHED if on_host and self.device.type != "cpu" else 0) if prefetch is None else prefetch
        self._read_ahead = read_ahead if isinstance(self.source, Reader) else 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that is iterated, and the batch it starts at (a run that goes on where it was stopped)."""
        whole = self._batches(epoch) if callable(self._batches) else self._batches
        if not 0 <= start <= len(whole):
            raise TrainError(f"start is {start}; epoch {epoch} has {len(whole)} batches; choose one of them")
        self._epoch = whole[start:]
        views = self._view(epoch)
        self._place_of_row = views * len(views) + np.arange(len(views))

    def __len__(self) -> int:
        """Return the number of batches that the next iteration gives."""
        return len(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch on the device."""
        for batch in _ahead(partial(self._read, self._place_of_row), self._arrived(), self._prefetch):
            yield batch.to(self.device) if self.device.type != "cpu" else batch

    def _arrived(self) -> Iterator[np.ndarray]:
        """Yield the rows of each batch once its segments are at hand, if they are to be brought ahead."""
        if not self._read_ahead or not isinstance(self.source, Reader):
            yield from self._epoch
            return
        names, segment_of_row = self._places.segments, self._places.segment[self._place_of_row]
        own = (self._share(self._place_of_row, rows)[0] for rows in self._epoch)
        needed = [[names[number] for number in np.unique(segment_of_row[rows])] for rows in own]
        with ReadAhead(self.source, needed, self._read_ahead, unread=self._prefetch) as ahead:
            for number, rows in enumerate(self._epoch):
                ahead.wait(number)
                yield rows

    def _share(self, place_of_row: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return this process's share of the rows of a batch, and where in it the share of each process is."""
        by_place = np.argsort(self._codes[place_of_row[rows]], kind="stable")
        places = shares(len(rows), self._world)
        return rows[by_place[places[self._rank]]], places

    def _read(self, place_of_row: np.ndarray, rows: np.ndarray) -> Batch:
        rows, places = self._share(place_of_row, rows)
        tensors = self.source.gather(self._places[place_of_row[rows]], self._pad, pin=self._pin)
        inputs = _with_prefix(tensors, INPUT_PREFIX)
        for name, (shape, dtype) in self._floats.items():
            inputs[name] = self._dummy(len(rows), shape, dtype)
        for name, shapes in _with_prefix(tensors, SHAPE_PREFIX).items():
            if name not in inputs:
                inputs[name] = self._dummy(len(rows), shapes.amax(0).tolist(), torch.float32)
        targets = {name: torch.from_numpy(values[rows]) for name, values in self._targets.items()}
        if self._pin:
            targets = {name: tensor.pin_memory() for name, tensor in targets.items()}
        targets |= _with_prefix(tensors, EXTRA_PREFIX)
        return Batch(_with_prefix(tensors, STATE_PREFIX), inputs, targets, torch.from_numpy(rows), places, self._fill)

    def _dummy(self, n_rows: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An input that is never read: one zero, seen as the whole shape."""
        return torch.zeros((), dtype=dtype, device=self.device).expand(n_rows, *shape)


def _with_prefix(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): item for name, item in named.items() if name.startswith(prefix)}


def _checked_target(name: str, values: Prepared, n_rows: int) -> Prepared:
    dtype = values.values.dtype if isinstance(values, Ragged) else values.dtype
    if dtype.kind not in "biuf":
        raise TrainError(f"target {name} has dtype {dtype}; a loader takes numbers, the task makes them of labels")
    if len(values) != n_rows:
        raise TrainError(f"target {name} has {len(values)} entries, the sample table {n_rows} rows; give one for each")
    return values


def _ahead(read: Callable[[np.ndarray], Batch], batches: Iterable[np.ndarray], depth: int) -> Iterator[Batch]:
    """Yield `read` of each batch, in order; with a `depth` that many are read by a thread before they are asked for."""
    if depth == 0:
        yield from map(read, batches)
        return
    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        try:
            for rows in batches:
                pending.append(pool.submit(read, rows))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def can_pin(device: torch.device) -> bool:
    """Say whether copies to `device` gain from page-locked memory: it is an accelerator, whose backend has some."""
    if device.type == "cpu":
        return False
    try:
        return bool(torch.empty(1, pin_memory=True).is_pinned())
    except (RuntimeError, NotImplementedError):
        return False


def _free_memory(device: torch.device) -> int:
    """Return the free memory of `device` in bytes, 0 where its backend does not tell: "auto" then stays on the host."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if tell is None else int(tell(device)[0])
