"""States for the suffixes of finished runs: those of a data set, stored or new, and those of stored samples alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipeline.data import Source
from pipeline.device import pick_device
from pipeline.encode.encoder import Encoder
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.run import encode_units
from pipeline.encode.unit import EncodeResult, plan
from pipeline.project.model import LoadedModel
from pipeline.runs.finished import FinishedRun
from pipeline.store import Reader, Rows, Store, discard, sweep, temporary_folder
from pipeline.train.loader import Batch, Loader, StoredRows


@contextmanager
def temporary_states(home: Path) -> Iterator[Path]:
    """Give a new folder below `home` for new states, removed at the end; remove those that killed commands left."""
    home.mkdir(parents=True, exist_ok=True)
    sweep(home)
    with temporary_folder(home) as folder:
        yield folder


class InputStates:
    """The states of inputs, shared by the runs of one store: the prefix runs once for all of them."""

    def __init__(self, run: FinishedRun, source: Source, keyed: KeyedSamples, folder: Path | None) -> None:
        """Prepare to read the states of `source` for `run`, or any other run of its store.

        The states of new samples join the store, or lie in `folder` until they are forgotten.
        """
        self.run, self.loaded, self.known = run, run.loaded, run.store.plain
        self.source, self.trimming_rows = source, keyed.trimming_rows
        self.keys, self.config = keyed.keys, run.loaded.project.encode
        self.device = pick_device(self.config.device)
        self.reader = run.loaded.project.reader(self.known.path)
        self.forgets = folder is not None
        self.fresh = (
            Store.create(self.known.path, self.known.recipe, self.known.remote)
            if folder is None
            else Store.create(folder / "store", self.known.recipe)
        )
        self.result = EncodeResult.empty(keyed, cuts=1)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of new samples; raises AbsentError where the run was opened without the layers before the cut."""
        self.loaded.to_device()
        views = [self.loaded.preprocess(None)]
        return Encoder(self.source, views, [self.run.prefix], [[self.fresh]], self.config, self.trimming_rows)

    def missing(self) -> np.ndarray:
        """Return which of all inputs have no state in the store, (N,) bool."""
        return self.known.missing(self.keys)

    def encode(self, rows: np.ndarray) -> None:
        """Run the prefix on those of `rows` (n,) int64 that are new."""
        units = plan(self.keys, [rows], [[self.fresh]], self.config.segment_samples)
        if units:
            self.result = encode_units(self.encoder, self.source, units, self.result)
        if not self.forgets:
            self.known.refresh()

    def read(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yield `rows` (n,) int64 in batches, each with the indices of its samples in `rows`; bad ones are left out.

        At most a segment of new states is held at a time.
        """
        is_new = self.known.missing(self.keys[rows])
        yield from self._batches(self.known, self.reader, rows, np.flatnonzero(~is_new))
        new, size = np.flatnonzero(is_new), self.config.segment_samples
        for begin in range(0, len(new) if self.forgets else 0, size):
            chosen = new[begin : begin + size]
            self.encode(rows[chosen])
            there = chosen[~self.fresh.missing(self.keys[rows[chosen]])]
            yield from self._batches(self.fresh, Reader(self.fresh.path, check=False), rows, there)
            for segment in self.fresh.segments():
                discard(self.fresh.path / segment)
            self.fresh.refresh()

    def _batches(
        self, store: Store, reader: Reader, rows: np.ndarray, chosen: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        places = store.rows(self.keys[rows[chosen]])
        return ((chosen[index], batch) for index, batch in stored_batches(self.loaded, places, reader, self.device))


def stored_batches(
    loaded: LoadedModel, places: Rows, reader: Reader, device: torch.device
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield the samples at `places` in batches of similar size, each in the order of the store, with their indices."""
    by_place = np.argsort(places.codes)
    order = by_place[np.argsort(reader.sizes(places[by_place]), kind="stable")]
    size = loaded.project.encode.batch_size
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    for batch in Loader(StoredRows(places, reader), {}, batches, pad=loaded.backbone.preprocess.pad, device=device):
        yield batch.rows.numpy(), batch
