"""Samples from a source, keyed and preprocessed off the main process; a bad one is a value, not an exception."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from pipeline.data.source import Row, Source, Stamp
from pipeline.encode.quarantine import ENDS_THE_RUN, BadSample, set_aside
from pipeline.encode.ragged import Sample, shapes
from pipeline.encode.stat_cache import StatCache
from pipeline.errors import BadSampleError, DataError
from pipeline.keys import KEY_BYTES
from pipeline.models import Preprocess

KEYED_AT_ONCE = 256
PROBES = 1 << 10
"""Rows among which the first two of unequal shapes are looked for."""
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


@dataclass(frozen=True)
class Keyed:
    """The keys of a data set."""

    keys: np.ndarray
    """(N, 16) uint8, one per row; zeros where the row cannot be read."""
    sizes: np.ndarray
    """(N,) int64, size of the content in bytes, characters or items."""
    bad: list[BadSample]
    """Rows set aside: they cannot be read or, after an encode, have no state."""
    rows: np.ndarray | None = None
    """The rows that are meant, (m,) int64; None for all."""

    @property
    def good(self) -> np.ndarray:
        """The rows that are meant and not set aside, (n,) int64."""
        rows = np.arange(len(self.keys)) if self.rows is None else self.rows
        return np.setdiff1d(rows, [sample.row for sample in self.bad])

    def meant(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` (n,) int64 that are meant."""
        return rows if self.rows is None else np.intersect1d(rows, self.rows)

    @property
    def probes(self) -> np.ndarray:
        """The first rows `outside_in`, at most `PROBES`: those on which it is found out how states are trimmed."""
        return self.outside_in()[:PROBES]

    def outside_in(self) -> np.ndarray:
        """Return the good rows by size: the shortest content, the longest, the second shortest, and so on."""
        good = self.good
        by_size = good[np.argsort(self.sizes[good], kind="stable")]
        order = np.empty_like(by_size)
        order[::2], order[1::2] = by_size[: (len(by_size) + 1) // 2], by_size[::-1][: len(by_size) // 2]
        return order


def key_contents(source: Source, *, workers: int, cache: StatCache | None = None, trust: bool = True) -> Keyed:
    """Return the key of every content of `source`, read once for it in `workers` threads.

    A file that `cache` knows by its stamp is not read, unless `trust` is False: then it is, and the cache is renewed.
    """
    count, now = len(source), time.time_ns()
    keys, sizes = np.zeros((count, KEY_BYTES), np.uint8), np.zeros(count, np.int64)
    stamps = [_stamp(source, row) for row in range(count)]
    known = cache.find(stamps) if cache and trust else {}
    keys[list(known)] = np.frombuffer(b"".join(known.values()), np.uint8).reshape(-1, KEY_BYTES)
    sizes[list(known)] = [stamp.size for row in known if (stamp := stamps[row])]

    def key_some(begin: int) -> list[BadSample]:
        bad = []
        for row in range(begin, min(begin + KEYED_AT_ONCE, count)):
            try:
                _check_row(source.row(row))
                if row not in known:
                    key, sizes[row] = _read_key(source, row)
                    keys[row] = np.frombuffer(key, np.uint8)
            except ENDS_THE_RUN:
                raise
            except BaseException as error:
                keys[row], sizes[row] = 0, 0
                bad.append(set_aside(source, row, error))
        return bad

    bad: list[BadSample] = []
    with (
        ThreadPoolExecutor(max_workers=workers) as pool,
        tqdm(total=count, desc="keys", unit="sample", disable=None) as progress,
    ):
        for found in pool.map(key_some, range(0, count, KEYED_AT_ONCE)):
            bad += found
            progress.update(min(KEYED_AT_ONCE, count - progress.n))
    keyed = Keyed(keys, sizes, bad)
    if cache:
        read = np.setdiff1d(keyed.good, list(known)).tolist()
        steady = [(row, stamp) for row in read if (stamp := stamps[row]) and stamp == _stamp(source, row)]
        cache.update([(stamp, keys[row].tobytes()) for row, stamp in steady if stamp.settled(now)], stamps)
    return keyed


def _read_key(source: Source, row: int) -> tuple[bytes, int]:
    content = source.content(row)
    return source.key(row, content), sum(map(len, content)) if isinstance(content, tuple | list) else len(content)


def _stamp(source: Source, row: int) -> Stamp | None:
    """The stamp of a row; a source that cannot even give that has the row read, which tells what is wrong."""
    try:
        return source.stamp(row)
    except ENDS_THE_RUN:
        raise
    except BaseException:
        return None


def _check_row(row: Row) -> None:
    """Refuse what the sample table could not hold: on Linux a file may have any bytes for a name, and JSON any text."""
    try:
        row.source.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError("the name is not UTF-8; rename the file") from error
    for name, target in row.targets.items():
        for value in target if isinstance(target, list) else [target]:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise BadSampleError(f"a number beyond 64 bits: the target {name} is {value}; make it a text")
            if isinstance(value, str) and not value.isascii():
                _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"half of a character (a lone surrogate): the target {name} has it; mend it") from error


def decode(source: Source, chunks: Sequence[Chunk], *, workers: int) -> Iterator[list[Decoded]]:
    """Yield the samples of each of `chunks` in each of its views, in order, made by `workers` processes."""
    if not chunks:
        return iter(())
    return iter(DataLoader(_Chunks(source, chunks), batch_size=None, num_workers=min(workers, len(chunks))))


@contextmanager
def dead_workers_told(workers: int) -> Iterator[None]:
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
