"""Rows of a store -> one batch, gathered from memory maps straight into its own memory.

B batch, and any further axes as the tensor has them.

Segments are opened when first needed and kept. Each sample's bytes are checked when they are first read.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store.format.metadata import read_recipe
from pipeline.store.format.names import CHUNK_SEPARATOR
from pipeline.store.local.files import DISK, StoreFiles
from pipeline.store.local.index import Rows
from pipeline.store.local.segment import Segment, fetch, map_segment, outline_segment
from pipeline.store.local.segment_cache import SegmentCache
from pipeline.store.local.stored_tensor import StoredTensor, as_numpy

READ_AHEAD_BYTES = 8 << 20
STREAMS = 4
"""Segments that are fetched at a time from a bucket."""
SHARED_ABOVE = 1 << 20
"""Bytes of a batch beyond which several threads fill it."""
COPIERS = 4
"""Threads at most: a few saturate the memory."""


class Reader:
    """Gathers batches from a store; segments are opened when first needed."""

    def __init__(
        self, root: Path, *, cache: SegmentCache | None = None, check: bool = True, remote: StoreFiles | None = None
    ) -> None:
        """Read the segments under the folder `root`.

        Args:
            root: the store.
            cache: for arrays that are compressed or in a bucket; None unpacks compressed ones into memory, for small
                stores.
            check: prove the bytes of every sample against their checksum when they are first read.
            remote: the bucket of the segments, if `root` is a folder of its mirror.
        """
        self._root, self._cache, self._check, self._files = root, cache, check, remote or DISK
        self._segments: dict[str, Segment] = {}
        self._outlines: dict[str, Segment] = {}
        self._recipes: dict[Path, str] = {}

    @property
    def streams(self) -> int:
        """Number of segments to fetch at a time: a disk reads one fastest, a network several."""
        return 1 if self._files.is_local else STREAMS

    def segment(self, segment: str) -> Segment:
        """Return a segment, opened once and kept until the cache evicts it.

        Raises:
            CorruptStoreError: metadata and chunk files are not those that were written.
        """
        opened = self._segments.get(segment)
        if opened is None:
            opened, evicted = map_segment(self.outline(segment), self._cache, self._files)
            self._close(evicted)
            self._segments[segment] = opened
        elif opened.cached and self._cache is not None:
            self._cache.reorder(opened.place, last=True)
        return opened

    def outline(self, segment: str) -> Segment:
        """Return a segment without its values, for which nothing is fetched; raises as `segment`."""
        outline = self._outlines.get(segment)
        if outline is None:
            path = self._root / segment
            if not path.is_dir():
                raise StoreError(
                    f"{path}: this segment was there when the store was opened, and is gone; recycle store compact, gc "
                    "or rm-samples has run since: start again"
                )
            if path.parent not in self._recipes:  # the root's, or that of a view's store below it
                self._recipes[path.parent] = read_recipe(path.parent).digest
            outline = self._outlines[segment] = outline_segment(path, self._recipes[path.parent], self._files)
        return outline

    def prefetch(self, segment: str) -> None:
        """Fetch a segment before it is needed: into the segment cache if it has to be there, else the page cache.

        Raises:
            StoreError: it cannot be fetched; CorruptStoreError as `segment`.
        """
        outline = self.outline(segment)
        if outline.cached and self._cache is not None:
            self._close(fetch(outline, self._cache, self._files)[1])
            return
        buffer = bytearray(READ_AHEAD_BYTES)
        for file in (file for name in outline.tensors for file in (outline.path / name).glob(f"c{CHUNK_SEPARATOR}*")):
            with file.open("rb", buffering=0) as chunk:
                while chunk.readinto(buffer):
                    pass

    def release(self, segment: str) -> None:
        """Make a segment that is not needed soon the first to be evicted from the cache."""
        outline = self.outline(segment)
        if outline.cached and self._cache is not None:
            self._segments.pop(segment, None)  # a mapped file keeps its space on disk, whoever evicts it
            self._cache.reorder(outline.place, last=False)

    def gather(
        self,
        rows: Rows,
        pad: Mapping[str, float] | None = None,
        *,
        pin: bool = False,
        into: np.ndarray | None = None,
        without: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Return the tensors of `rows` by name, each (B, ...), in memory of its own.

        Samples of different shapes are padded on the right to the longest, with `pad[name]` or 0. fp16 and bf16 samples
        in one batch give fp32. Rows that come segment by segment are gathered fastest; `pin` gives page-locked memory.
        Row i becomes row `into[i]` of the batch, (B,) int64, by default i. Tensors `without` which the caller does are
        not read.

        Raises:
            CorruptStoreError: a segment is not what was written, or has other tensors than the first one.
        """
        opened = [(self.segment(segment), within, begin) for segment, within, begin in runs(rows)]
        names = opened[0][0].tensors.keys() if opened else ()
        for segment, within, _ in opened:
            if segment.tensors.keys() != names:
                raise CorruptStoreError(
                    f"{segment.path} has tensors {sorted(segment.tensors)}, others {sorted(names)}; encode again"
                )
            if self._check:
                segment.check(within)
        return {
            name: _gather(
                [(segment.tensors[name], within, begin) for segment, within, begin in opened],
                (pad or {}).get(name, 0),
                pin,
                into,
            )
            for name in names
            if name not in without
        }

    def sizes(self, rows: Rows) -> np.ndarray:
        """Return the bytes of each sample as stored, (n,) int64; reads no values.

        Inputs count too: at cut 0 of a text network there is nothing else.
        """
        sizes = np.zeros(len(rows), np.int64)
        for name, within, begin in runs(rows):
            for tensor in self.outline(name).tensors.values():
                sizes[begin : begin + len(within)] += tensor.sizes(within)
        return sizes

    def check(self, segment: str, rows: np.ndarray) -> None:
        """Prove the bytes of some rows of a segment against their checksums, where checks are on.

        Raises:
            CorruptStoreError: they are not those that were written.
        """
        opened = self.segment(segment)
        if self._check:
            opened.check(rows)

    def _close(self, places: Sequence[Path]) -> None:
        """Close the segments that were evicted from these places: a mapped file keeps its space on disk."""
        for name, segment in list(self._segments.items()) if places else ():
            if segment.place in places:
                self._segments.pop(name, None)


def runs(rows: Rows) -> Iterator[tuple[str, np.ndarray, int]]:
    """Divide `rows` into stretches of one segment: its id, the rows within it, and where the stretch begins."""
    if not len(rows):
        return
    begins = [0, *(np.flatnonzero(np.diff(rows.segment)) + 1).tolist(), len(rows)]
    for begin, end in itertools.pairwise(begins):
        yield rows.segments[rows.segment[begin]], rows.row[begin:end], begin


def _gather(
    parts: list[tuple[StoredTensor, np.ndarray, int]], pad: float, pin: bool, into: np.ndarray | None
) -> Tensor:
    tensors = [tensor for tensor, _, _ in parts]
    n_rows = parts[-1][2] + len(parts[-1][1])
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    shapes = {tensor.spec.entry for tensor in tensors}
    if len(shapes) > 1 or any(tensor.offsets is not None for tensor in tensors):
        return _gather_padded(parts, n_rows, dtype, pad, pin, np.arange(n_rows) if into is None else into)
    batch = _new_batch((n_rows, *shapes.pop()), dtype, pin)
    plain = [part for part in parts if part[0].values.dtype == dtype]
    values, out = [as_numpy(tensor.values) for tensor, _, _ in plain], as_numpy(batch)

    def copy(share: int, shares: int) -> None:
        first, end = n_rows * share // shares, n_rows * (share + 1) // shares
        for (_, within, begin), mapped in zip(plain, values, strict=True):
            low, high = max(first - begin, 0), min(end - begin, len(within))
            if low < high and into is not None:
                out[into[begin + low : begin + high]] = mapped[within[low:high]]
            elif low < high:  # only with mode="clip" does np.take write into `out` directly
                np.take(mapped, within[low:high], axis=0, out=out[begin + low : begin + high], mode="clip")

    _in_threads(copy, batch.nbytes)
    for tensor, within, begin in parts if len(plain) < len(parts) else ():
        if tensor.values.dtype != dtype:
            places = np.arange(begin, begin + len(within)) if into is None else into[begin : begin + len(within)]
            batch[torch.from_numpy(places)] = tensor.take(within).to(dtype)
    return batch


def _gather_padded(
    parts: list[tuple[StoredTensor, np.ndarray, int]],
    n_rows: int,
    dtype: torch.dtype,
    pad: float,
    pin: bool,
    into: np.ndarray,
) -> Tensor:
    samples = [(tensor.dtype, sample) for tensor, within, _ in parts for sample in tensor.samples(within)]
    longest = tuple(map(max, zip(*(sample.shape for _, sample in samples), strict=True)))
    batch = _new_batch((n_rows, *longest), dtype, pin)
    filler, out = as_numpy(torch.tensor(pad, dtype=dtype)), as_numpy(batch)

    def fill(share: int, shares: int) -> None:
        for number in range(share, n_rows, shares):
            place, (own, sample) = into[number], samples[number]
            if own is not dtype:
                sample = as_numpy(torch.from_numpy(np.ascontiguousarray(sample)).view(own).to(dtype))
            if sample.shape[1:] == longest[1:]:
                out[place, : len(sample)] = sample
                if len(sample) < longest[0]:
                    out[place, len(sample) :] = filler
            else:
                out[place] = filler
                out[place][tuple(map(slice, sample.shape))] = sample

    _in_threads(fill, batch.nbytes)
    return batch


def _in_threads(work: Callable[[int, int], None], nbytes: int) -> None:
    """Call `work(share, shares)` for each share, in several threads where there are many bytes to copy.

    numpy releases the interpreter lock while it copies. torch's own threads copy faster when nothing else runs, and
    thirty times slower when something does: each of them waits for all at the end of every call.
    """
    shares = min(torch.get_num_threads(), COPIERS) if nbytes > SHARED_ABOVE else 1
    others = [_copiers().submit(work, share, shares) for share in range(1, shares)]
    work(0, shares)
    for copied in others:
        copied.result()


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    """Return the threads that fill batches, shared by all readers of the process: more would only share the memory."""
    return ThreadPoolExecutor(COPIERS, thread_name_prefix="copier")


def _new_batch(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    except (RuntimeError, MemoryError) as error:
        raise StoreError(f"a batch of shape {shape} in {dtype} finds no memory; make batches smaller") from error
