"""What a run is fed: which samples make up each batch of each epoch, in which view, and where they are read from.

A store that exceeds half of the memory is not shuffled at random, which would read the disk sample by sample: batches
are drawn from a window of segments, and those of the next window are read ahead, whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import order
from pipeline.data import SampleTable
from pipeline.loader import Loader, place
from pipeline.memory import memory_bytes
from pipeline.project import Workbench
from pipeline.store import Reader
from pipeline.views import Views

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
    project = bench.project
    reader = project.reader(views.path)
    source = place(views, table.keys, device, reader=reader)
    draws = Draws.of(bench, table, views, reader, memory if source is reader else None)
    targets = bench.task.prepare(table)

    def load(part: str) -> Loader:
        return Loader(
            views,
            table.keys,
            targets,
            lambda epoch: draws.batches(part, epoch),
            view=draws.views if part == "train" else None,
            pad=bench.backbone.preprocess.pad,
            device=device,
            source=source,
            read_ahead=draws.read_ahead,
        )

    return load("train"), load("validation")


@dataclass(frozen=True)
class Draws:
    """The order of a run's samples, a function of the epoch; N rows of the sample table.

    Attributes:
        count: how many views there are.
        window: how many segments training batches are drawn from at a time; None draws from all.
        segments: (N,) number of the segment that a row lies in.
        sizes: (N,) bytes of a row's state, where samples of similar length share a batch.
        read_ahead: batches that one window gives.
    """

    bench: Workbench
    table: SampleTable
    count: int
    window: int | None
    segments: np.ndarray
    sizes: np.ndarray | None
    read_ahead: int

    @classmethod
    def of(cls, bench: Workbench, table: SampleTable, views: Views, reader: Reader, memory: int | None) -> Draws:
        """Find out how the samples of `table` lie; `memory` in bytes is this machine's if None."""
        config = bench.project.train
        places = views.rows(table.keys)[np.arange(len(table))]
        sizes = reader.sizes(places) if config.group_by_length else None
        window = None
        if config.shuffle != "exact":
            nbytes = sum(store.nbytes() for store in views.stores)
            cached = int(CACHED_SHARE * (memory_bytes() if memory is None else memory))
            if config.shuffle == "window" or nbytes > cached:
                segment = nbytes / max(1, sum(len(store.segments()) for store in views.stores))
                window = max(1, int(cached / WINDOWS_CACHED / segment))
                log.info(
                    "the store has %.1f GB: batches are drawn from %d segments at a time, of %d",
                    *(nbytes / 1e9, window, len(np.unique(places.segment))),
                )
        a_segment = len(table) / max(1, len(np.unique(places.segment)))
        read_ahead = 0 if window is None else int(np.ceil(window * a_segment / config.batch_size))
        return cls(bench, table, views.count, window, places.segment, sizes, read_ahead)

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

    def views(self, epoch: int) -> np.ndarray:
        """Return which view of each row is trained on, (N,) int64."""
        config = self.bench.project.train
        return order.views(len(self.table), self.count, seed=config.seed, epoch=epoch, how=config.views)


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
