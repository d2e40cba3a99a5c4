"""Samples from a source, keyed and preprocessed off the main process; a bad one is a value, not an exception."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.data.source import Source
from pipeline.encode.quarantine import ENDS_THE_RUN, BadSample, set_aside
from pipeline.encode.ragged import Sample, shapes
from pipeline.errors import BadSampleError, DataError
from pipeline.models import Preprocess

_DEAD = "DataLoader worker (pid"
"""How torch's message begins when a worker process has died."""


@dataclass(frozen=True)
class Chunk:
    """Samples to read and preprocess together."""

    rows: np.ndarray
    """Row numbers, (n,) int64."""
    views: Sequence[Preprocess]
    """The views in which they are wanted: the preprocessing of each."""
    keys: np.ndarray | None = None
    """Their keys, (n, 16) uint8: a content that is no longer the one its key was made of is a bad sample. None asks
    for no check."""


@dataclass(frozen=True)
class Decoded:
    """Preprocessed samples of some rows in one view, without the bad ones."""

    rows: np.ndarray
    """Rows of the good samples, (n,) int64."""
    inputs: dict[str, Tensor] | list[Sample]
    """Where all are alike, stacked along a new first axis and still to be finished (`Preprocess.finish`), on whatever
    device the batch goes to. Else one by one, finished."""
    bad: list[BadSample]
    cut_off: list[int] = field(default_factory=list)
    """Tokens lost by each text that is longer than its inputs may be."""


def decode(source: Source, chunks: Sequence[Chunk], *, workers: int) -> Iterator[list[Decoded]]:
    """Yield the samples of each of `chunks` in each of its views, in order, made by `workers` processes."""
    if not chunks:
        return iter(())
    return iter(DataLoader(_Chunks(source, chunks), batch_size=None, num_workers=min(workers, len(chunks))))


@contextmanager
def explain_dead_workers(workers: int) -> Iterator[None]:
    """Say what to do about a worker process that died; torch may notice at any moment inside.

    Raises:
        DataError: one did.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_DEAD):
            raise
        raise DataError(
            f"encode.workers is {workers}, and one of these processes died ({' '.join(str(error).split())}): out of "
            "memory, or a sample that crashes its decoder. What was committed stays. Set fewer workers; 0 reads in "
            "the main process, where PYTHONFAULTHANDLER=1 shows a crash"
        ) from error


class _Chunks(Dataset[list[Decoded]]):
    def __init__(self, source: Source, chunks: Sequence[Chunk]) -> None:
        self.source, self.chunks = source, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Decoded]:
        return decode_rows(self.source, self.chunks[index])


def decode_rows(source: Source, chunk: Chunk) -> list[Decoded]:
    """Read and preprocess samples in this process; each is read and opened once for all its views."""
    rows = chunk.rows.tolist()
    keys = [None] * len(rows) if chunk.keys is None else [key.tobytes() for key in chunk.keys]
    made = [_in_views(source, chunk.views, row, key) for row, key in zip(rows, keys, strict=True)]
    decoded = []
    for number, view in enumerate(chunk.views):
        of_view = [in_views[number] for in_views in made]
        good = [(row, one) for row, one in zip(rows, of_view, strict=True) if not isinstance(one, BadSample)]
        bad = [one for one in of_view if isinstance(one, BadSample)]
        inputs = _stacked(view, [sample for _, (sample, _) in good])
        cut_off = [excess for _, (_, excess) in good if excess]
        decoded.append(Decoded(np.asarray([row for row, _ in good], np.int64), inputs, bad, cut_off))
    return decoded


def decode_samples(source: Source, preprocess: Preprocess, rows: np.ndarray) -> list[Sample]:
    """Read and preprocess `rows` in this process, sample by sample, without the bad ones."""
    (decoded,) = decode_rows(source, Chunk(rows, [preprocess]))
    if isinstance(decoded.inputs, list):
        return decoded.inputs
    batch = preprocess.finish(decoded.inputs)
    return [dict(zip(batch, tensors, strict=True)) for tensors in zip(*batch.values(), strict=True)]


def _in_views(
    source: Source, views: Sequence[Preprocess], row: int, key: bytes | None
) -> list[tuple[Sample, int] | BadSample]:
    """Return a sample in each view, and how many tokens its text lost."""
    try:
        content = source.content(row)
        if key is not None and source.key(row, content) != key:
            raise BadSampleError("the content is not the one its key was made of; encode again with --rehash")
        opened = views[0].open(content)
    except ENDS_THE_RUN:
        raise
    except BaseException as error:
        return [set_aside(source, row, error) for _ in views]
    return [_begun(source, view, row, content, opened) for view in views]


def _begun(source: Source, view: Preprocess, row: int, content: Any, opened: Any) -> tuple[Sample, int] | BadSample:
    try:
        sample = view.begin(opened)
        return sample, view.excess(content, sample)
    except ENDS_THE_RUN:
        raise
    except BaseException as error:
        return set_aside(source, row, error)


def _stacked(preprocess: Preprocess, samples: list[Sample]) -> dict[str, Tensor] | list[Sample]:
    kinds = {(shapes(sample), tuple(tensor.dtype for tensor in sample.values())) for sample in samples}
    if len(kinds) == 1:
        stacked: dict[str, Tensor] = default_collate(samples)
        return stacked
    return [_finished(preprocess, sample) for sample in samples]


def _finished(preprocess: Preprocess, sample: Sample) -> Sample:
    batch = preprocess.finish({name: tensor.unsqueeze(0) for name, tensor in sample.items()})
    return {name: tensor.squeeze(0) for name, tensor in batch.items()}
