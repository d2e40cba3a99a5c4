"""What a run is fed: which samples make up each batch of each epoch, in which view, and where they are read from.

A store that exceeds half of the memory is not shuffled at random, which would read the disk sample by sample: batches
are drawn from a window of segments, and those of the next window are read ahead, whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import order, processes
from pipeline.data import SampleTable
from pipeline.loader import Loader, Source, place
from pipeline.memory import memory_bytes
from pipeline.store import Reader, Rows
from pipeline.tasks import Prepared
from pipeline.towers import Abreast, Tower
from pipeline.train import TrainConfig
from pipeline.views import Views
from pipeline.workbench import Workbench

log = logging.getLogger("recycle")

CACHED_SHARE = 0.5
"""Share of the memory that the page cache is taken to have for a store."""
WINDOWS_CACHED = 4
"""Windows that this share holds: the one that is drawn from, the one that is read ahead, and room to spare."""


def open_loaders(
    bench: Workbench, table: SampleTable, views: Views, device: torch.device, memory: int | None = None
) -> tuple[Loader, Loader]:
    """Return the loaders of the training and of the validation samples; `memory` in bytes is this machine's if None.

    Raises:
        MissingKeysError: some samples of the table were never encoded; the message names up to five.
        CorruptStoreError: the store is not what was written.
    """
    fed = Fed.of(bench, table, np.arange(len(table)), views, device)
    draws = Draws.of(bench, table, [fed], memory)
    targets = bench.task.prepare(table)
    return fed.loader(draws, "train", targets), fed.loader(draws, "validation", targets)


def open_joint_loaders(
    towers: Sequence[Tower], table: SampleTable, device: torch.device, memory: int | None = None
) -> tuple[Abreast, Abreast]:
    """Return the same of several towers, whose samples together are those of `table`; raises the same errors.

    Each tower has states where its `train.residency` puts them; its targets are those that the first one's task
    prepares.
    """
    feds = {str(tower.name): Fed.of(tower.bench, tower.table, tower.rows, tower.store, device) for tower in towers}
    bench, rows = towers[0].bench, {name: fed.rows for name, fed in feds.items()}
    draws = Draws.of(bench, table, list(feds.values()), memory)
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
    """

    bench: Workbench
    rows: np.ndarray
    keys: np.ndarray
    views: Views
    places: Rows
    reader: Reader
    source: Source
    device: torch.device

    @classmethod
    def of(cls, bench: Workbench, table: SampleTable, rows: np.ndarray, views: Views, device: torch.device) -> Fed:
        """Choose where the samples of `table`, M, are read from."""
        reader = bench.project.reader(views.path)
        source = place(views, table.keys, device, bench.project.train.residency, reader=reader)
        places = views.rows(table.keys)[np.arange(len(table))]
        return cls(bench, rows, table.keys, views, places, reader, source, device)

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
            read_ahead=draws.read_ahead,
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
        read_ahead: batches that one window gives.
    """

    bench: Workbench
    table: SampleTable
    window: int | None
    segments: np.ndarray
    sizes: np.ndarray | None
    read_ahead: int

    @classmethod
    def of(cls, bench: Workbench, table: SampleTable, feds: Sequence[Fed], memory: int | None) -> Draws:
        """Find out how the samples of `table` lie; `memory` in bytes is this machine's if None.

        A unit lies where its first row does: of several stores, it is the segments of the first that are drawn from.
        """
        config, first = bench.project.train, feds[0]
        segments, sizes = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
        for fed in feds:
            segments[fed.rows] = fed.places.segment
            if config.group_by_length:
                sizes[fed.rows] = fed.reader.sizes(fed.places)
        drawn_from = len(np.unique(first.places.segment))
        # Processes may differ in memory, and must not in the order.
        window = processes.on_main(lambda: _window(config, feds, drawn_from, memory))
        a_segment = len(first.rows) / max(1, drawn_from)
        read_ahead = 0 if window is None else int(np.ceil(window * a_segment / config.batch_size))
        return cls(bench, table, window, segments, sizes if config.group_by_length else None, read_ahead)

    def batches(self, part: str, epoch: int) -> list[np.ndarray]:
        """Return the rows of each batch of a split; only training samples are shuffled."""
        config, training = self.bench.project.train, part == "train"
        units = self.bench.task.units(self.table, part, seed=config.seed, epoch=epoch)
        windowed = training and self.window is not None
        return order.batches(
            units,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            shuffle=training,
            window=order.Window(_of_first(units, self.segments), self.window or 1) if windowed else None,
            lengths=None if self.sizes is None else _of_longest(units, self.sizes),
        )


def _window(config: TrainConfig, feds: Sequence[Fed], drawn_from: int, memory: int | None) -> int | None:
    """Return how many segments are drawn from at a time, of `drawn_from`; None where the order is exact."""
    if config.shuffle == "exact":
        return None
    if any(fed.source is not fed.reader for fed in feds):
        memory = None
    nbytes = sum(store.nbytes() for fed in feds for store in fed.views.stores)
    cached = int(CACHED_SHARE * (memory_bytes() if memory is None else memory))
    if config.shuffle == "auto" and nbytes <= cached:
        return None
    segment = nbytes / max(1, sum(len(store.segments()) for store in feds[0].views.stores))
    window = max(1, int(cached / WINDOWS_CACHED / segment))
    log.info(
        "the store has %.1f GB: batches are drawn from %d segments at a time, of %d", nbytes / 1e9, window, drawn_from
    )
    return window


def _of_first(units: Sequence[np.ndarray] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each unit the value of its first row."""
    if isinstance(units, np.ndarray):
        units = units.reshape(len(units), -1)[:, 0]
    else:
        units = np.array([unit[0] for unit in units], np.int64)
    first: np.ndarray = values[units]
    return first


def _of_longest(units: Sequence[np.ndarray] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each unit the largest value of its rows."""
    if isinstance(units, np.ndarray):
        longest: np.ndarray = values[units.reshape(len(units), -1)].max(axis=1, initial=0)
        return longest
    return np.array([values[unit].max() for unit in units])
