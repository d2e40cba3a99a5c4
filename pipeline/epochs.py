"""What a run is fed: which samples make up each batch of each epoch, in which view, and where they are read from.

A store that exceeds half of the memory, or the scratch that it must be brought to, is not shuffled at random, which
would read it sample by sample: batches are drawn from a window of segments, and the next are brought ahead, whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipeline.data import SampleTable
from pipeline.errors import ConfigError
from pipeline.memory import memory_bytes
from pipeline.project.towers import Abreast, Tower
from pipeline.project.workbench import Workbench
from pipeline.store import Reader, Rows
from pipeline.tasks import Prepared
from pipeline.train import order, processes
from pipeline.train.loader import Loader, Source, place
from pipeline.views import Views

log = logging.getLogger("recycle")

CACHED_SHARE = 0.5
"""Share of the memory that the page cache is taken to have for a store."""
LOOKED_AT = 256
"""Segments whose sizes are looked at where they cannot be told from files."""
ROOM_SHARE = 0.5
"""Share of that for the segments drawn from and those brought ahead, half for each."""


def open_loaders(
    bench: Workbench,
    table: SampleTable,
    views: Views,
    device: torch.device,
    memory: int | None = None,
    *,
    least: int = 1,
) -> tuple[Loader, Loader]:
    """Return the loaders of the training and of the validation samples.

    `memory` in bytes is this machine's if None; a training batch has at least so many units.

    Raises:
        MissingKeysError: some samples of the table were never encoded; the message names up to five.
        CorruptStoreError: the store is not what was written.
    """
    fed = Fed.of(bench, table, np.arange(len(table)), views, device)
    draws = Draws.of(bench, table, [fed], memory, least)
    targets = bench.task.prepare(table)
    return fed.loader(draws, "train", targets), fed.loader(draws, "validation", targets)


def open_joint_loaders(
    towers: Sequence[Tower], table: SampleTable, device: torch.device, memory: int | None = None, *, least: int = 1
) -> tuple[Abreast, Abreast]:
    """Return the same of several towers, whose samples together are those of `table`; raises the same errors.

    Each tower has states where its `train.residency` puts them; its targets are those that the first one's task
    prepares.
    """
    feds = {str(tower.name): Fed.of(tower.bench, tower.table, tower.rows, tower.store, device) for tower in towers}
    bench, rows = towers[0].bench, {name: fed.rows for name, fed in feds.items()}
    draws = Draws.of(bench, table, list(feds.values()), memory, least)
    targets = bench.task.prepare(table)

    def load(part: str) -> Abreast:
        loaders = {
            name: fed.loader(draws, part, {target: values[fed.rows] for target, values in targets.items()})
            for name, fed in feds.items()
        }
        return Abreast(loaders, rows)

    return load("train"), load("validation")


@dataclass(frozen=True)
class Fed:
    """What an encoder is fed from: M samples, at `rows` of the N of the sample table.

    Attributes:
        keys: of its samples, (M, 16) uint8.
        places: where each lies in its first view, M places.
        segments: all segments that they lie in, in any view.
    """

    bench: Workbench
    rows: np.ndarray
    keys: np.ndarray
    views: Views
    places: Rows
    segments: tuple[str, ...]
    reader: Reader
    source: Source
    device: torch.device

    @classmethod
    def of(cls, bench: Workbench, table: SampleTable, rows: np.ndarray, views: Views, device: torch.device) -> Fed:
        """Choose where the samples of `table`, M, are read from."""
        reader = bench.project.reader(views.path)
        source = place(views, table.keys, device, bench.project.train.residency, reader=reader)
        places = views.rows(table.keys)
        segments = tuple(places.segments[number] for number in np.unique(places.segment))
        first = places[np.arange(len(table))]
        return cls(bench, rows, table.keys, views, first, segments, reader, source, device)

    @property
    def is_brought(self) -> bool:
        """Whether segments must be brought to scratch before they can be read."""
        return self.bench.project.remote is not None or self.bench.project.encode.codec == "zstd"

    @cached_property
    def nbytes(self) -> int:
        """What its segments take where they are read from; where these are many, as some of them tell."""
        if self.is_brought:
            some = self.segments[:: max(1, len(self.segments) // LOOKED_AT)]
            return len(self.segments) * sum(self.reader.outline(segment).nbytes for segment in some) // len(some)
        return sum(store.nbytes() for store in self.views.stores)

    def loader(self, draws: Draws, part: str, targets: Mapping[str, Prepared]) -> Loader:
        """Return the loader of its samples among those that are drawn; `targets` have M entries."""
        config, own = self.bench.project.train, np.full(len(draws.table), -1)
        own[self.rows] = np.arange(len(self.rows))

        def batches(epoch: int) -> list[np.ndarray]:
            return [mine[mine >= 0] for mine in (own[rows] for rows in draws.batches(part, epoch))]

        def views(epoch: int) -> np.ndarray:
            return order.views(len(self.rows), self.views.count, seed=config.seed, epoch=epoch, how=config.views)

        return Loader(
            self.views,
            self.keys,
            targets,
            batches,
            view=views if part == "train" else None,
            pad=self.bench.backbone.preprocess.pad,
            device=self.device,
            source=self.source,
            read_ahead=draws.room // draws.feds,
            rank=processes.rank(),
            world=processes.world(),
        )


@dataclass(frozen=True)
class Draws:
    """The order of a run's samples, a function of the epoch; N rows of the sample table.

    Attributes:
        window: how many segments training batches are drawn from at a time; None draws from all.
        segments: (N,) number of the segment that a row lies in.
        sizes: (N,) bytes of a row's state, where samples of similar length share a batch.
        room: bytes of segments that may be at hand at a time; 0 where nothing is brought ahead.
        feds: how many encoders share it.
        least: how many units a training batch has at least, where there are so many.
    """

    bench: Workbench
    table: SampleTable
    window: int | None
    segments: np.ndarray
    sizes: np.ndarray | None
    room: int
    feds: int
    least: int

    @classmethod
    def of(cls, bench: Workbench, table: SampleTable, feds: Sequence[Fed], memory: int | None, least: int) -> Draws:
        """Find out how the samples of `table` lie; `memory` in bytes is this machine's if None.

        A unit lies where its first row does: of several stores, it is the segments of the first that are drawn from.
        """
        config = bench.project.train
        segments, sizes = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
        for fed in feds:
            segments[fed.rows] = fed.places.segment
            if config.group_by_length:
                sizes[fed.rows] = fed.reader.sizes(fed.places)
        # Processes may differ in memory, and must not in the order.
        room, window = processes.on_main(lambda: _room_and_window(feds, memory))
        return cls(bench, table, window, segments, sizes if config.group_by_length else None, room, len(feds), least)

    def batches(self, part: str, epoch: int) -> list[np.ndarray]:
        """Return the rows of each batch of a split; only training samples are shuffled."""
        config, training = self.bench.project.train, part == "train"
        units = self.bench.task.units(self.table, part, seed=config.seed, epoch=epoch)
        if self.window is not None and not training:
            by_segment = np.argsort(_of_first(units, self.segments), kind="stable")
            units = units[by_segment] if isinstance(units, np.ndarray) else [units[unit] for unit in by_segment]
        windowed = training and self.window is not None
        return order.batches(
            units,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            shuffle=training,
            least=self.least if training else 1,
            window=order.Window(_of_first(units, self.segments), self.window or 1) if windowed else None,
            lengths=None if self.sizes is None else _of_longest(units, self.sizes),
        )


def _room_and_window(feds: Sequence[Fed], memory: int | None) -> tuple[int, int | None]:
    """Return the attributes `room` and `window` of `Draws`; raises as `_room`."""
    first, (room, is_windowed) = feds[0], _room(feds, memory)
    if not is_windowed:
        return room, None
    views = first.views.count if first.bench.project.train.views == "random" else 1
    segment = sum(fed.nbytes for fed in feds) / len(first.segments) * views
    window = max(1, int(room / 2 / segment))
    log.info(
        "batches are drawn from %d segments at a time, of %d, for %.1f GB at hand",
        *(window, len(np.unique(first.places.segment)), room / 1e9),
    )
    return room, window


def _room(feds: Sequence[Fed], memory: int | None) -> tuple[int, bool]:
    """Return how many bytes of segments are kept at hand, 0 to leave that to the page cache, and whether in windows.

    Raises:
        ConfigError: batches are to be drawn from all segments, and not all of them fit in scratch.
    """
    config = feds[0].bench.project.train
    read = [fed for fed in feds if fed.source is fed.reader]
    cached = int(CACHED_SHARE * (memory_bytes() if memory is None or len(read) < len(feds) else memory))
    scratch = int(config.scratch_gb * 1e9)
    nbytes, brought = sum(fed.nbytes for fed in read), sum(fed.nbytes for fed in read if fed.is_brought)
    if config.shuffle == "exact" and brought > scratch:
        raise ConfigError(
            f"train.shuffle is exact, for which all {brought / 1e9:.3g} GB of the store must fit in scratch; "
            f"train.scratch_gb is {config.scratch_gb:g}; raise it, or set shuffle to auto"
        )
    if config.shuffle == "exact" or (config.shuffle == "auto" and nbytes <= cached and brought <= scratch):
        return scratch if brought else 0, False
    room = int(ROOM_SHARE * cached)
    return min(room, scratch) if brought else room, True


def _of_first(units: Sequence[np.ndarray] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each unit the value of its first row."""
    if isinstance(units, np.ndarray):
        units = units if units.ndim == 1 else units[:, 0]
    else:
        units = np.array([unit[0] for unit in units], np.int64)
    first: np.ndarray = values[units]
    return first


def _of_longest(units: Sequence[np.ndarray] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each unit the largest value of its rows."""
    if isinstance(units, np.ndarray):
        longest: np.ndarray = values[units if units.ndim > 1 else units[:, None]].max(axis=1, initial=0)
        return longest
    return np.array([values[unit].max() for unit in units])
