"""Loaders of a run: which samples make up each batch of each epoch, in which view, and where they are read from.

A store that exceeds half of the memory, or the local space for unpacked segments, is not shuffled at random, which
would read it sample by sample: batches are drawn from a window of segments, and the next segments are fetched whole in
advance.

N rows of the sample table, M samples of one encoder.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipeline.data import SPLITS, SampleTable
from pipeline.errors import ConfigError
from pipeline.memory import memory_bytes
from pipeline.project.towers import Tower, TowerLoader
from pipeline.store import CODECS, Reader, Rows
from pipeline.tasks import Prepared, Task
from pipeline.train import order, processes
from pipeline.train.config import TrainConfig
from pipeline.train.loader import Loader, StoredRows, choose_source

log = logging.getLogger("recycle")

CACHED_SHARE = 0.5
"""Share of the memory that the page cache is assumed to have for a store."""
SIZED_SEGMENTS = 256
"""Segments whose sizes are read where the sizes of files do not tell them."""
ROOM_SHARE = 0.5
"""Share of the page cache for a window of segments: half for those in use, half for those fetched in advance."""


def open_feeds(towers: Sequence[Tower], device: torch.device) -> "dict[str, Feed]":
    """Return what reads the states of each of `towers`, by name; several runs may use it, one after the other.

    Raises:
        MissingKeysError: some samples of the table were never encoded; the message names up to five.
        TrainError: `train.residency` is device, and the states do not fit in its memory.
    """
    return {str(tower.name): Feed.of(tower, device) for tower in towers}


def open_loaders(
    towers: Sequence[Tower],
    table: SampleTable,
    device: torch.device,
    memory: int | None = None,
    *,
    minimum: int = 1,
    feeds: "Mapping[str, Feed] | None" = None,
    sample: np.ndarray | None = None,
) -> list[Loader | TowerLoader]:
    """Return the loaders of the training, the validation and the test samples of `towers`, one or several.

    The targets are those that the task of the first one prepares. `memory` in bytes is this machine's if None; a
    training batch has at least `minimum` units. `feeds` are opened unless they are given. Of towers that were opened on
    a `sample` of the table, it is given here too.

    Raises:
        MissingKeysError: some samples of the table were never encoded; the message names up to five.
        CorruptStoreError: a store is damaged.
        ConfigError: batches are to be drawn from all segments, which do not fit in the local space.
    """
    feeds = open_feeds(towers, device) if feeds is None else feeds
    first = towers[0].loaded
    targets = first.task.prepare(table)
    if sample is not None:
        table, targets = table.of(sample), {name: values[sample] for name, values in targets.items()}
    schedule = Schedule.of(first.project.train, first.task, table, list(feeds.values()), memory, minimum)

    def loader(feed: Feed, part: str) -> Loader:
        own = {name: values[feed.tower.rows] for name, values in targets.items()} if len(feeds) > 1 else targets
        return feed.loader(schedule, part, own)

    if len(towers) == 1:
        (feed,) = feeds.values()
        return [loader(feed, part) for part in SPLITS]
    rows = {name: feed.tower.rows for name, feed in feeds.items()}
    return [TowerLoader({name: loader(feed, part) for name, feed in feeds.items()}, rows) for part in SPLITS]


@dataclass(frozen=True)
class Feed:
    """The stored samples of one encoder, and what reads them.

    Attributes:
        places: places of its M samples in the first view.
        segments: all segments that they are in, in any view.
    """

    tower: Tower
    samples: StoredRows
    places: Rows
    segments: tuple[str, ...]
    reader: Reader
    device: torch.device

    @classmethod
    def of(cls, tower: Tower, device: torch.device) -> "Feed":
        """Choose where the samples of `tower` are read from."""
        views, project = tower.store, tower.loaded.project
        reader, places = project.reader(views.path), views.places
        source = choose_source(places, reader, device, project.train.residency)
        segments = tuple(places.segments[number] for number in np.unique(places.segment))
        return cls(tower, StoredRows(places, source, views.count), views.first_places(), segments, reader, device)

    @property
    def needs_fetching(self) -> bool:
        """True if segments are fetched or unpacked to local files before they are read."""
        project = self.tower.loaded.project
        return project.remote is not None or not CODECS[project.encode.codec].is_mappable

    @cached_property
    def nbytes(self) -> int:
        """Size of its segments as they are read; estimated from some of them where there are many."""
        if self.needs_fetching:
            some = self.segments[:: max(1, len(self.segments) // SIZED_SEGMENTS)]
            return len(self.segments) * sum(self.reader.outline(segment).nbytes for segment in some) // len(some)
        return sum(store.nbytes() for store in self.tower.store.stores)

    def loader(self, schedule: "Schedule", part: str, targets: Mapping[str, Prepared]) -> Loader:
        """Return the loader of its samples among those of a split; `targets` have M entries."""
        config, rows = schedule.config, self.tower.rows
        own_row = np.full(len(schedule.table), -1)
        own_row[rows] = np.arange(len(rows))

        def batches(epoch: int) -> list[np.ndarray]:
            return [own[own >= 0] for own in (own_row[batch] for batch in schedule.batches(part, epoch))]

        def views(epoch: int) -> np.ndarray:
            return order.views(len(rows), self.samples.views, seed=config.seed, epoch=epoch, how=config.views)

        return Loader(
            self.samples,
            targets,
            batches,
            view=views if part == "train" else None,
            pad=self.tower.loaded.backbone.preprocess.pad,
            device=self.device,
            read_ahead=schedule.room // schedule.feeds,
            share=(processes.rank(), processes.world()),
        )


@dataclass(frozen=True)
class Schedule:
    """The batches of a run, a function of the epoch.

    Attributes:
        window: number of segments from which training batches are drawn at a time; None draws from all.
        segments: (N,) number of the segment that contains a row.
        sizes: (N,) bytes of the state of a row, where samples of similar length share a batch.
        room: bytes of segments that are held at a time; 0 where none is fetched in advance.
        feeds: number of encoders that share the room.
        minimum: units that a training batch has at least, if there are so many.
    """

    config: TrainConfig
    task: Task
    table: SampleTable
    window: int | None
    segments: np.ndarray
    sizes: np.ndarray | None
    room: int
    feeds: int
    minimum: int

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        task: Task,
        table: SampleTable,
        feeds: Sequence[Feed],
        memory: int | None,
        minimum: int,
    ) -> "Schedule":
        """Find where the samples of `table` are stored; `memory` in bytes is this machine's if None.

        A unit belongs to the segment of its first row; with several stores, to that of the first store.
        """
        segments, sizes = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
        for feed in feeds:
            segments[feed.tower.rows] = feed.places.segment
            if config.group_by_length:
                sizes[feed.tower.rows] = feed.reader.sizes(feed.places)
        # Processes may differ in memory, but must agree on the order.
        room, window = processes.on_main(lambda: _room_and_window(config, feeds, memory))
        sized = sizes if config.group_by_length else None
        return cls(config, task, table, window, segments, sized, room, len(feeds), minimum)

    def batches(self, part: str, epoch: int) -> list[np.ndarray]:
        """Return the rows of each batch of a split; only training samples are shuffled."""
        config, training = self.config, part == "train"
        units = self.task.units(self.table, part, seed=config.seed, epoch=epoch)
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
            least=self.minimum if training else 1,
            window=order.Window(_of_first(units, self.segments), self.window or 1) if windowed else None,
            lengths=None if self.sizes is None else _of_longest(units, self.sizes),
        )


def _room_and_window(config: TrainConfig, feeds: Sequence[Feed], memory: int | None) -> tuple[int, int | None]:
    """Return the attributes `room` and `window` of `Schedule`; raises as `_room`."""
    first, (room, is_windowed) = feeds[0], _room(config, feeds, memory)
    if not is_windowed:
        return room, None
    views = first.samples.views if config.views == "random" else 1
    segment = sum(feed.nbytes for feed in feeds) / len(first.segments) * views
    window = max(1, int(room / 2 / segment))
    log.info(
        "batches are drawn from %d segments at a time, of %d, for %.1f GB at hand",
        *(window, len(np.unique(first.places.segment)), room / 1e9),
    )
    return room, window


def _room(config: TrainConfig, feeds: Sequence[Feed], memory: int | None) -> tuple[int, bool]:
    """Return how many bytes of segments are held, 0 to leave that to the page cache, and whether in windows.

    Raises:
        ConfigError: batches are to be drawn from all segments, and not all of them fit in the local space.
    """
    read = [feed for feed in feeds if feed.samples.source is feed.reader]
    cached = int(CACHED_SHARE * (memory_bytes() if memory is None or len(read) < len(feeds) else memory))
    space = int(config.scratch_gb * 1e9)
    nbytes, fetched = sum(feed.nbytes for feed in read), sum(feed.nbytes for feed in read if feed.needs_fetching)
    if config.shuffle == "exact" and fetched > space:
        raise ConfigError(
            f"train.shuffle is exact, for which all {fetched / 1e9:.3g} GB of the store must fit in scratch; "
            f"train.scratch_gb is {config.scratch_gb:g}; raise it, or set shuffle to auto"
        )
    if config.shuffle == "exact" or (config.shuffle == "auto" and nbytes <= cached and fetched <= space):
        return space if fetched else 0, False
    room = int(ROOM_SHARE * cached)
    return min(room, space) if fetched else room, True


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
