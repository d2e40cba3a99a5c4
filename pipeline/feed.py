"""Samples from a source, keyed and preprocessed off the main process; a bad one is a value, not an exception."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from pipeline.data.source import Source
from pipeline.errors import DataError
from pipeline.keys import KEY_BYTES, content_key
from pipeline.models import Preprocess
from pipeline.ragged import Sample, shapes

KEYED_AT_ONCE = 256


@dataclass(frozen=True)
class BadSample:
    """A sample that was set aside."""

    row: int
    source: str
    reason: str


Chunk: TypeAlias = tuple[np.ndarray, Sequence[Preprocess]]
"""Row numbers, and the views in which they are wanted: the preprocessing of each."""


@dataclass(frozen=True)
class Decoded:
    """Preprocessed samples of some rows in one view, without the bad ones."""

    rows: np.ndarray
    """Rows of the good samples, (n,) int64."""
    inputs: dict[str, Tensor] | list[Sample]
    """Where all are alike, stacked along a new first axis and still to be finished (`Preprocess.finish`), on whatever
    device the batch goes to. Else one by one, finished."""
    bad: list[BadSample]


@dataclass(frozen=True)
class Keyed:
    """The keys of a data set."""

    keys: np.ndarray
    """(N, 16) uint8, one per row; zeros where the row cannot be read."""
    sizes: np.ndarray
    """(N,) int64, size of the content in bytes, characters or items."""
    bad: list[BadSample]
    """Rows that cannot be read."""

    @property
    def good(self) -> np.ndarray:
        """Rows that have a key, (n,) int64."""
        return np.setdiff1d(np.arange(len(self.keys)), [sample.row for sample in self.bad])

    def extremes(self) -> np.ndarray:
        """Return the two rows of the shortest and the two of the longest contents."""
        by_size = self.good[np.argsort(self.sizes[self.good], kind="stable")]
        return np.unique(np.concatenate([by_size[:2], by_size[-2:]]))


def key_contents(source: Source, *, workers: int) -> Keyed:
    """Read every content of `source` once, for its key, in `workers` threads."""
    count = len(source)
    keys, sizes = np.zeros((count, KEY_BYTES), np.uint8), np.zeros(count, np.int64)

    def key_some(begin: int) -> list[BadSample]:
        bad = []
        for row in range(begin, min(begin + KEYED_AT_ONCE, count)):
            try:
                content = source.content(row)
                keys[row] = np.frombuffer(content_key(content), np.uint8)
                sizes[row] = sum(map(len, content)) if isinstance(content, tuple) else len(content)
            except Exception as error:
                bad.append(_set_aside(source, row, error))
        return bad

    bad: list[BadSample] = []
    with (
        ThreadPoolExecutor(max_workers=workers) as pool,
        tqdm(total=count, desc="keys", unit="sample", disable=None) as progress,
    ):
        for found in pool.map(key_some, range(0, count, KEYED_AT_ONCE)):
            bad += found
            progress.update(min(KEYED_AT_ONCE, count - progress.n))
    return Keyed(keys, sizes, bad)


def decode(source: Source, chunks: Sequence[Chunk], *, workers: int) -> Iterator[list[Decoded]]:
    """Yield the samples of each of `chunks` in each of its views, in order, made by `workers` processes."""
    if not chunks:
        return iter(())
    return iter(DataLoader(_Chunks(source, chunks), batch_size=None, num_workers=min(workers, len(chunks))))


class _Chunks(Dataset[list[Decoded]]):
    def __init__(self, source: Source, chunks: Sequence[Chunk]) -> None:
        self.source, self.chunks = source, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Decoded]:
        return decode_rows(self.source, self.chunks[index])


def decode_rows(source: Source, chunk: Chunk) -> list[Decoded]:
    """Read and preprocess samples in this process; each is read and opened once for all its views."""
    rows, views = chunk
    made = [_in_views(source, views, row) for row in rows.tolist()]
    decoded = []
    for number, view in enumerate(views):
        of_view = [in_views[number] for in_views in made]
        good = [(row, one) for row, one in zip(rows.tolist(), of_view, strict=True) if not isinstance(one, BadSample)]
        bad = [one for one in of_view if isinstance(one, BadSample)]
        inputs = _stacked(view, [sample for _, sample in good])
        decoded.append(Decoded(np.asarray([row for row, _ in good], np.int64), inputs, bad))
    return decoded


def decode_samples(source: Source, preprocess: Preprocess, rows: np.ndarray) -> list[Sample]:
    """Read and preprocess `rows` in this process, sample by sample, without the bad ones."""
    (decoded,) = decode_rows(source, (rows, [preprocess]))
    if isinstance(decoded.inputs, list):
        return decoded.inputs
    batch = preprocess.finish(decoded.inputs)
    return [dict(zip(batch, tensors, strict=True)) for tensors in zip(*batch.values(), strict=True)]


def _in_views(source: Source, views: Sequence[Preprocess], row: int) -> list[Sample | BadSample]:
    try:
        opened = views[0].open(source.content(row))
    except Exception as error:
        return [_set_aside(source, row, error) for _ in views]
    return [_begun(source, view, row, opened) for view in views]


def _begun(source: Source, view: Preprocess, row: int, opened: Any) -> Sample | BadSample:
    try:
        return view.begin(opened)
    except Exception as error:
        return _set_aside(source, row, error)


def _stacked(preprocess: Preprocess, samples: list[Sample]) -> dict[str, Tensor] | list[Sample]:
    kinds = {(shapes(sample), tuple(tensor.dtype for tensor in sample.values())) for sample in samples}
    if len(kinds) == 1:
        stacked: dict[str, Tensor] = default_collate(samples)
        return stacked
    return [_finished(preprocess, sample) for sample in samples]


def _finished(preprocess: Preprocess, sample: Sample) -> Sample:
    batch = preprocess.finish({name: tensor.unsqueeze(0) for name, tensor in sample.items()})
    return {name: tensor.squeeze(0) for name, tensor in batch.items()}


def _set_aside(source: Source, row: int, error: Exception) -> BadSample:
    reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    return BadSample(row, source.row(row).source, " ".join(reason.split()))
