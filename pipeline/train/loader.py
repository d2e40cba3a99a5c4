"""Rows of the sample table -> batches on the training device."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.device import free_memory, has_streams, on_stream
from pipeline.errors import TrainError
from pipeline.split import State
from pipeline.store import (
    EXTRA_PREFIX,
    INPUT_PREFIX,
    SHAPE_PREFIX,
    STATE_PREFIX,
    ReadAhead,
    Reader,
    Resident,
    Rows,
)
from pipeline.tasks import IGNORED, Prepared, Ragged
from pipeline.train.config import Residency
from pipeline.train.order import shares

T = TypeVar("T")

Order: TypeAlias = Sequence[np.ndarray] | Callable[[int], Sequence[np.ndarray]]
"""The batches of every epoch, or a function of the epoch; a batch is rows of the sample table."""

View: TypeAlias = Callable[[int], np.ndarray]
"""A function of the epoch: the view to take of each row of the sample table, (N,) int64."""

DEVICE_SHARE = 0.5
"""Share of the free device memory that "auto" uses for states; weights, gradients and optimizer need the rest."""
PREFETCHED = 2


class StateSource(Protocol):
    """Gathers batches: from memory maps, or from the memory of the device."""

    def gather(self, rows: Rows, pad: Mapping[str, float] | None = None, *, pin: bool = False) -> dict[str, Tensor]:
        """Return the tensors of `rows` by name, each (B, ...)."""


@dataclass(frozen=True)
class Batch:
    """B samples on the training device.

    Attributes:
        state: what crosses the cut, each (B, ...) in its stored dtype, padded with 0 on the right where ragged.
        inputs: the suffix's other inputs, each (B, ...); those in floating point have a shape and no values.
        targets: each (B, ...), in the order of the samples; plus the extras stored with these samples.
        rows: (B,) int64, the samples' rows in the sample table; always on the CPU.
        places: for each of several processes, the indices of its samples in the whole step, (B,) int64.
        padding: what targets are padded with, by name, where they are ragged and it is not 0.
    """

    state: State
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    rows: Tensor
    places: Sequence[np.ndarray] = ()
    padding: Mapping[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; from page-locked memory the copy does not wait."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return replace(self, state=moved(self.state), inputs=moved(self.inputs), targets=moved(self.targets))


@dataclass(frozen=True)
class StoredRows:
    """N rows of a sample table, looked up in a store once, and what gathers their states."""

    places: Rows
    """Places of the rows in V views, V * N, view by view."""
    source: StateSource
    views: int = 1
    """V."""

    def __len__(self) -> int:
        return len(self.places) // self.views


def choose_source(
    places: Rows, reader: Reader, device: torch.device, residency: Residency = "auto"
) -> Reader | Resident:
    """Return what gathers the samples at `places`: their copies on the device, or the `reader` of their store.

    "auto" copies them to an accelerator when they fit in half of its free memory.

    Raises:
        TrainError: "device" was asked for and there is not enough memory; the message has both sizes.
    """
    if residency == "host" or device.type == "cpu":
        return reader
    needed, free = Resident.nbytes(reader, places), free_memory(device)
    if residency == "auto" and needed > DEVICE_SHARE * free:
        return reader
    if needed > free:
        raise TrainError(
            f"residency is device; the samples need {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; "
            "set it to auto"
        )
    return Resident(reader, places, device)


class Loader:
    """The batches of an epoch; can be iterated again and again.

    Within a batch, samples are in the order of the store. Each of several processes has its own loader, which yields
    its share of every batch.
    """

    def __init__(
        self,
        samples: StoredRows,
        targets: Mapping[str, Prepared],
        batches: Order,
        *,
        view: View | None = None,
        pad: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
        read_ahead: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Prepare to load `samples`, the N rows of a table; no state is read yet.

        Args:
            samples: where the rows are stored. Loaders may share their source.
            targets: numeric, each (N, ...) or ragged, one entry for every row of the table.
            batches: rows of the table for every batch; see `pipeline.train.order`.
            view: which view of each row an epoch takes; by default the first one.
            pad: what ragged inputs and extras are padded with, by name; 0 where not given.
            device: where batches are wanted. An accelerator has two batches read ahead by a thread; on the CPU that
                would take a core from training.
            read_ahead: bytes of segments held at a time: those being read, and those that threads fetch whole before
                they are needed; 0 fetches none. It pays where batches are drawn from a few segments at a time, and a
                disk or a network is slow.
            share: rank of this process, and how many processes share every batch.

        Raises:
            TrainError: targets do not fit the table.
        """
        self.device = torch.device(device)
        self.source = samples.source
        self._places = samples.places
        self._view: View = view or (lambda epoch: np.zeros(len(samples), np.int64))
        self._targets = {name: _checked_target(name, values, len(samples)) for name, values in targets.items()}
        self._batches = batches
        self._pad = {
            name if name.startswith(EXTRA_PREFIX) else f"{INPUT_PREFIX}{name}": value
            for name, value in (pad or {}).items()
        }
        self._fill = {name: float(IGNORED) for name, values in targets.items() if isinstance(values, Ragged)}
        self._fill |= _with_prefix(self._pad, EXTRA_PREFIX)
        self._rank, self._world = share
        on_host = not isinstance(self.source, Resident)
        self._pin = on_host and has_streams(self.device)
        self._prefetch = PREFETCHED if on_host and self.device.type != "cpu" else 0
        self._read_ahead = read_ahead if isinstance(self.source, Reader) else 0
        self.set_epoch(0)

    @property
    def reads_ahead(self) -> bool:
        """True if the loader fetches segments ahead of the batches that read them, and keeps them until then."""
        return self._read_ahead > 0

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        """Choose the epoch of the next iteration, and its batches from `start` to before `end`."""
        self._epoch = (self._batches(epoch) if callable(self._batches) else self._batches)[start:end]
        views = self._view(epoch)
        self._place_of_row = views * len(views) + np.arange(len(views))

    def __len__(self) -> int:
        """Return the number of batches that the next iteration gives."""
        return len(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch on the device.

        Where there are streams, the thread that reads also copies, on a stream of its own, while others are computed.
        """
        stream = torch.Stream(self.device) if self._pin else None
        send = partial(self._send, stream, self._place_of_row)
        for _source, batch, arrived in _ahead(send, self._arrived(), self._prefetch):  # the copy reads `_source`
            if arrived is not None:
                current = torch.accelerator.current_stream(self.device)
                current.wait_event(arrived)
                for tensor in itertools.chain(batch.state.values(), batch.inputs.values(), batch.targets.values()):
                    tensor.record_stream(current)  # it belongs to `stream`, which must not reuse it before
            yield batch

    def _send(
        self, stream: torch.Stream | None, place_of_row: np.ndarray, rows: np.ndarray
    ) -> tuple[Batch, Batch, torch.Event | None]:
        """Return a batch as read and on the device, and what its use there has to wait for."""
        batch = self._read(place_of_row, rows)
        if self.device.type == "cpu":
            return batch, batch, None
        with on_stream(stream) if stream is not None else nullcontext():
            return batch, batch.to(self.device), None if stream is None else stream.record_event()

    def _arrived(self) -> Iterator[np.ndarray]:
        """Yield the rows of each batch, once its segments are local if they are fetched in advance."""
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
        """Return this process's share of the rows of a batch, and the indices of each process's share."""
        by_place = np.argsort(self._places.codes[place_of_row[rows]], kind="stable")
        places = shares(len(rows), self._world)
        return rows[by_place[places[self._rank]]], places

    def _read(self, place_of_row: np.ndarray, rows: np.ndarray) -> Batch:
        rows, places = self._share(place_of_row, rows)
        tensors = self.source.gather(self._places[place_of_row[rows]], self._pad, pin=self._pin)
        inputs = _with_prefix(tensors, INPUT_PREFIX)
        for name, shapes in _with_prefix(tensors, SHAPE_PREFIX).items():
            zero = torch.zeros((), device=self.device)  # its values are never read
            inputs[name] = zero.expand(len(rows), *shapes.amax(0).tolist())
        targets = {name: torch.from_numpy(values[rows]) for name, values in self._targets.items()}
        if self._pin:
            targets = {name: tensor.pin_memory() for name, tensor in targets.items()}
        targets |= _with_prefix(tensors, EXTRA_PREFIX)
        return Batch(_with_prefix(tensors, STATE_PREFIX), inputs, targets, torch.from_numpy(rows), places, self._fill)


def _with_prefix(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): item for name, item in named.items() if name.startswith(prefix)}


def _checked_target(name: str, values: Prepared, n_rows: int) -> Prepared:
    dtype = values.values.dtype if isinstance(values, Ragged) else values.dtype
    if dtype.kind not in "biuf":
        raise TrainError(f"target {name} has dtype {dtype}; a loader takes numbers, the task makes them of labels")
    if len(values) != n_rows:
        raise TrainError(f"target {name} has {len(values)} entries, the sample table {n_rows} rows; give one for each")
    return values


def _ahead(read: Callable[[np.ndarray], T], batches: Iterable[np.ndarray], depth: int) -> Iterator[T]:
    """Yield `read(rows)` of each batch, in order; a thread reads up to `depth` batches in advance."""
    if depth == 0:
        yield from map(read, batches)
        return
    pending: deque[Future[T]] = deque()
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
