"""Samples read and preprocessed in worker processes; a bad sample is returned as a value, not raised."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pipeline.data.source import Source
from pipeline.encode.quarantine import BadSample, attempt, set_aside
from pipeline.encode.ragged import Sample, shapes
from pipeline.errors import BadSampleError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models import Preprocess

_DEAD = "DataLoader worker (pid"
"""Start of torch's message about a worker process that died."""


@dataclass(frozen=True)
class Chunk:
    """Samples to read and preprocess together."""

    rows: np.ndarray
    """Row numbers, (n,) int64."""
    views: "Sequence[Preprocess]"
    """The preprocessing of each view that is needed."""
    keys: np.ndarray | None = None
    """Their keys, (n, 16) uint8; a content that no longer has its key is a bad sample. None skips this check."""


@dataclass(frozen=True)
class Decoded:
    """Preprocessed samples of some rows in one view, without the bad ones."""

    rows: np.ndarray
    """Rows of the good samples, (n,) int64."""
    inputs: "dict[str, Tensor] | list[Sample]"
    """Not finished yet (`Preprocess.finish`): stacked along a new first axis if shapes and types agree, else
    sample by sample."""
    bad: list[BadSample]
    cut_off: list[int] = field(default_factory=list)
    """Number of tokens truncated, for each text that is too long."""


def decode(source: Source, chunks: Sequence[Chunk], *, workers: int) -> Iterator[list[Decoded]]:
    """Yield the samples of each of `chunks` in each of its views, in order, preprocessed by `workers` processes."""
    from torch.utils.data import DataLoader  # noqa: PLC0415  (slow to import, and often nothing is to do)

    read = partial(decode_rows, source)
    workers = min(workers, len(chunks))
    return iter(DataLoader(chunks, batch_size=None, collate_fn=read, num_workers=workers))  # type: ignore[arg-type]


@contextmanager
def explain_dead_workers(workers: int) -> Iterator[None]:
    """Turn torch's error about a dead worker process into a DataError with a remedy."""
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


def decode_rows(source: Source, chunk: Chunk) -> list[Decoded]:
    """Read and preprocess samples in this process; each is read and decoded once for all views.

    Of those that follow each other, alike ones are preprocessed at once; others one by one, so that none waits decoded.
    """
    rows = chunk.rows.tolist()
    keys = [None] * len(rows) if chunk.keys is None else [key.tobytes() for key in chunk.keys]
    in_views: list[list[Begun]] = [[] for _ in chunk.views]

    def alike(one: _Read | BadSample) -> Hashable:
        return None if isinstance(one, BadSample) else chunk.views[0].alike(one.opened)

    reading = (_read(source, chunk.views[0], row, key) for row, key in zip(rows, keys, strict=True))
    for kind, group in itertools.groupby(reading, alike):
        for some in ([one] for one in group) if kind is None else [list(group)]:
            for view, of_view in zip(chunk.views, in_views, strict=True):
                of_view.extend(_begin(source, view, some))
    decoded = []
    for of_view in in_views:
        good = [(row, one) for row, one in zip(rows, of_view, strict=True) if not isinstance(one, BadSample)]
        bad = [one for one in of_view if isinstance(one, BadSample)]
        inputs = _stacked([sample for _, (sample, _) in good])
        cut_off = [excess for _, (_, excess) in good if excess]
        decoded.append(Decoded(np.asarray([row for row, _ in good], np.int64), inputs, bad, cut_off))
    return decoded


def decode_samples(source: Source, preprocess: "Preprocess", rows: np.ndarray) -> list[Sample]:
    """Read and preprocess `rows` in this process, sample by sample, without the bad ones."""
    (decoded,) = decode_rows(source, Chunk(rows, [preprocess]))
    return finished_samples(preprocess, decoded)


def finished_samples(preprocess: "Preprocess", decoded: Decoded) -> list[Sample]:
    """Return the inputs of decoded samples, finished, one by one."""
    if isinstance(decoded.inputs, list):
        return [finish_sample(preprocess, sample) for sample in decoded.inputs]
    batch = preprocess.finish(decoded.inputs)
    return [dict(zip(batch, tensors, strict=True)) for tensors in zip(*batch.values(), strict=True)]


@dataclass(frozen=True)
class _Read:
    """A sample that was read; `opened` is what all views share."""

    row: int
    content: Any
    opened: Any


Begun: TypeAlias = "tuple[Sample, int] | BadSample"
"""A sample in a view, with the number of tokens that truncation removed."""


def _read(source: Source, preprocess: "Preprocess", row: int, key: bytes | None) -> _Read | BadSample:
    def read() -> _Read:
        content = source.content(row)
        if key is not None and source.key(row, content) != key:
            raise BadSampleError("the content is not the one its key was made of; encode again with --rehash")
        return _Read(row, content, preprocess.open(content))

    return attempt(read, partial(set_aside, source, row))


def _begin(source: Source, view: "Preprocess", some: Sequence[_Read | BadSample]) -> list[Begun]:
    """Return samples that are alike, or a single one, in a view; if one of them is bad, the others still are good."""
    opened = [one.opened for one in some if isinstance(one, _Read)]
    together = attempt(lambda: view.begin_alike(opened), lambda _: None) if len(some) > 1 else None

    def begin(number: int, one: _Read) -> tuple[Sample, int]:
        sample = view.begin(one.opened) if together is None else together[number]
        return sample, view.excess(one.content, sample)

    return [
        attempt(partial(begin, number, one), partial(set_aside, source, one.row)) if isinstance(one, _Read) else one
        for number, one in enumerate(some)
    ]


def _stacked(samples: list[Sample]) -> "dict[str, Tensor] | list[Sample]":
    kinds = {(shapes(sample), tuple(tensor.dtype for tensor in sample.values())) for sample in samples}
    if len(kinds) == 1:
        from torch.utils.data import default_collate  # noqa: PLC0415

        stacked: dict[str, Tensor] = default_collate(samples)
        return stacked
    return samples


def finish_sample(preprocess: "Preprocess", sample: Sample) -> Sample:
    """Return the inputs of one sample, finished as a batch of one."""
    batch = preprocess.finish({name: tensor.unsqueeze(0) for name, tensor in sample.items()})
    return {name: tensor.squeeze(0) for name, tensor in batch.items()}
