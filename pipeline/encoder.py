"""Units of samples -> segments: the engine of `encode`, and what every executor runs.

Three things overlap: worker processes read and preprocess, this process runs the prefix, and a thread writes segments.
"""

from __future__ import annotations

import itertools
import operator
import re
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.config import Section
from pipeline.data.source import Source
from pipeline.encoded import Costs, Encoded
from pipeline.feed import Chunk, Decoded, decode, decode_samples
from pipeline.models import EXTRA, Preprocess, network_inputs
from pipeline.quarantine import BadSample, name_of
from pipeline.ragged import Sample, Trimming, find_trimming, pad_batch, shapes
from pipeline.split import Capture, Prefix, capture
from pipeline.store import Store
from pipeline.unit import Unit, UnitBuffer

Buffers: TypeAlias = dict[int, UnitBuffer]
"""What one part gives at each of its cuts, by the number of the cut."""

PROBED_AT_ONCE = 4
PARTS_IN_FLIGHT = 2
"""Finished parts that may wait for the writer; with the one being computed they bound the encoder's memory."""
INFINITE = "its state holds NaN or infinity"
CUT_PATH = re.compile(r"\w[\w-]*(\.[\w-]+)*(#\d+)?")
"""Names of modules joined by dots, and the number of a call. A cut names a directory too: nothing else may pass."""


class EncodeConfig(Section):
    """How states are made. Of these settings cuts, `dtype`, `codec`, `precision` and `views` decide what is stored."""

    cuts: list[float | int | str] = Field(min_length=1)
    """Where to split: a share of the blocks (0.5; 0 for the inputs, 1 for the head only), a number of blocks from 2 on
    (6), or a module path ("layer3"; "layer#2" for its third call). `recycle cuts` lists what there is and its cost. One
    pass serves all of them."""
    store: str | None = None
    """Where states are stored: a URL below which each cut has its folder, `s3://BUCKET/PREFIX`, `gs://`, `az://` or
    `file:///FOLDER`; null for the folder data/activations. Credentials come from the environment (AWS_ACCESS_KEY_ID,
    ...), as do endpoint and region (AWS_ENDPOINT_URL, AWS_REGION). Training brings segments to local scratch
    (`train.scratch_gb`)."""
    store_options: dict[str, str | int | bool] = Field(default_factory=dict)
    """obstore's options for that place where the environment does not have them: {endpoint: ..., region: ...}. What is
    secret is refused here."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type states are stored in; a tensor that leaves float16's range is stored as bfloat16."""
    codec: Literal["raw", "zstd", "int8", "int8-channel"] = "raw"
    """How states lie on disk. "raw": as they are, memory-mapped. "zstd": compressed without loss, unpacked to local
    scratch for training. "int8": whole numbers of one byte and a scale per row (token, channel map), "int8-channel" per
    channel; `recycle store error` tells what these two change."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the prefix computes in: below float32 under autocast."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per forward pass of the prefix."""
    views: int | None = Field(default=None, ge=1)
    """Augmented views stored of each training sample, made by `preprocess.augment`; null for none. Each is a store of
    its own beside the plain one, which then holds the held-out samples alone. More views encode only themselves, and
    fewer leave the others where they are. While a segment is encoded, its samples' inputs wait in memory in all views
    (0.15 MB each at 224 pixels)."""
    segment_samples: int = Field(default=512, ge=1)
    """Samples per segment: the unit of work that is committed whole."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and preprocess samples; 0 does it in this process. null: 0 where the prefix runs on the CPU,
    whose cores it uses all by itself, else one for every core."""
    device: str = "auto"
    """"auto" (the accelerator if there is one), "cpu", "cuda:0", ..."""
    channels_last: bool = False
    """Run image backbones in channels-last memory format: faster on most accelerators."""
    suffix: bool = True
    """Keep the pretrained weights after each cut beside its store (`<cut>/suffix`): who has the store alone, and not
    the weights of `model`, can train from it. They take as much room as those weights do."""
    max_bad: int | float = Field(default=0, ge=0)
    """Bad samples tolerated before the run ends with exit code 3: a count, or below 1 a fraction of the data set."""

    def tolerated(self, samples: int) -> int:
        """Return how many bad ones `max_bad` tolerates among so many samples."""
        return int(self.max_bad if self.max_bad >= 1 else self.max_bad * samples + 1e-9)

    @field_validator("cuts")
    @classmethod
    def _distinct(cls, cuts: list[float | int | str]) -> list[float | int | str]:
        for cut in cuts:
            check_cut(cut)
        if len({str(cut) for cut in cuts}) != len(cuts):
            raise ValueError("a cut is listed twice; name each once")
        return cuts


def check_cut(cut: float | int | str) -> None:
    """Raise ValueError unless `cut` is one as `EncodeConfig.cuts` describes them."""
    if isinstance(cut, str):
        if not CUT_PATH.fullmatch(cut):
            raise ValueError(f"{cut!r} is no module path: names joined by dots, as in encoder.layer.6")
    elif not (0 <= cut <= 1 or (isinstance(cut, int) and cut > 1)):
        raise ValueError(
            f"a share of the blocks lies in 0..1, a number of blocks is whole and from 2 on; {cut} is neither, "
            "and a module path is a string"
        )


@dataclass(frozen=True)
class Part:
    """One unit in one view: what is computed and committed together."""

    rows: np.ndarray
    """Row numbers in the data set, (n,) int64."""
    view: int
    """Number of the view."""
    cuts: tuple[int, ...]
    """Numbers of the cuts whose stores lack these samples in this view."""


class Encoder:
    """Runs units: the same unit gives the same segments, whoever runs it."""

    def __init__(
        self,
        source: Source,
        views: Sequence[Preprocess],
        prefixes: Sequence[Prefix],
        stores: Sequence[Sequence[Store]],
        config: EncodeConfig,
        probes: np.ndarray,
    ) -> None:
        """Prepare to run units, whose stores are counted through `stores[view][cut]`, view by view.

        `probes` are the rows on which it is found out how ragged states are trimmed: the first ones of unequal shapes.
        """
        self.source, self.views, self.probes = source, views, probes
        self.preprocess = views[0]  # for what all views share
        self.prefixes, self.stores, self.config = prefixes, stores, config
        self.device = model_device(prefixes)
        self.captures: dict[tuple[int, ...], Capture] = {}
        self.trimmings: dict[int, Trimming] = {}

    def run(self, units: Sequence[Unit], done: Encoded) -> Generator[tuple[Part, list[BadSample]], None, None]:
        """Encode `units`; yield each part, with the samples it set aside, once its segments are committed."""
        parts_of_units = [self.parts(unit) for unit in units]
        chunks_of_units = [self._chunks(parts) for parts in parts_of_units]
        in_order = list(itertools.chain.from_iterable(chunks_of_units))
        decoded = decode(self.source, in_order, workers=self.workers, keys=done.keyed.keys)
        waiting: list[tuple[Part, list[BadSample], Future[None]]] = []
        with _writer() as pool:
            for parts, chunks in zip(parts_of_units, chunks_of_units, strict=True):
                # What the first part takes as it comes is kept for the others: preprocessed images are small.
                of_unit = itertools.tee(itertools.islice(decoded, len(chunks)), len(parts))
                for number, (part, in_views) in enumerate(zip(parts, of_unit, strict=True)):
                    buffers, bad = self._encode(part, map(operator.itemgetter(number), in_views), done)
                    waiting.append((part, bad, pool.submit(self._write, part, buffers, done)))
                    while len(waiting) > PARTS_IN_FLIGHT:
                        yield _committed(waiting.pop(0))
            while waiting:
                yield _committed(waiting.pop(0))

    def parts(self, unit: Unit) -> list[Part]:
        """Divide a unit by view."""
        by_view = itertools.groupby((divmod(number, len(self.prefixes)) for number in unit.stores), lambda at: at[0])
        return [Part(unit.rows, view, tuple(cut for _, cut in at)) for view, at in by_view]

    def _chunks(self, parts: Sequence[Part]) -> list[Chunk]:
        """Divide the rows of a unit into batches, wanted in the views of its parts."""
        size, rows, views = self.config.batch_size, parts[0].rows, [self.views[part.view] for part in parts]
        return [(rows[begin : begin + size], views) for begin in range(0, len(rows), size)]

    @property
    def workers(self) -> int:
        """Processes that read and preprocess."""
        if self.config.workers is not None:
            return self.config.workers
        return 0 if self.device.type == "cpu" else torch.get_num_threads()

    def _encode(self, part: Part, decoded: Iterator[Decoded], done: Encoded) -> tuple[Buffers, list[BadSample]]:
        """Run the prefix over one part. Samples of unequal shapes wait for its end, to be batched by length."""
        buffers = {cut: UnitBuffer(part.rows) for cut in part.cuts}
        bad: list[BadSample] = []
        ragged: list[tuple[int, Sample]] = []
        costs = done.costs
        for _ in range(0, len(part.rows), self.config.batch_size):
            start = time.perf_counter()
            chunk = next(decoded)
            costs.reading += time.perf_counter() - start
            bad += chunk.bad
            done.cut_off += chunk.cut_off
            if isinstance(chunk.inputs, dict):
                self._forward(buffers, chunk.rows, chunk.inputs, None, costs)
            else:
                ragged += zip(chunk.rows.tolist(), chunk.inputs, strict=True)
        for pads, alike in self._by_padding(buffers) if ragged else []:
            for rows, samples in self._by_length(ragged, pads=pads):
                self._forward(alike, rows, pad_batch(samples, self.preprocess.pad), samples, costs)
        costs.samples += len(part.rows)
        infinite = set().union(*(buffer.infinite for buffer in buffers.values()))
        bad += [BadSample(row, name_of(self.source, row), INFINITE) for row in sorted(infinite)]
        for buffer in buffers.values():
            buffer.drop({sample.row for sample in bad})
        return buffers, bad

    def _forward(
        self,
        buffers: Buffers,
        rows: np.ndarray,
        batch: dict[str, Tensor],
        samples: list[Sample] | None,
        costs: Costs,
    ) -> None:
        cuts = tuple(buffers)
        if cuts not in self.captures:
            self.captures[cuts] = capture([self.prefixes[cut] for cut in cuts])
        run = self.captures[cuts]
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        if samples is None:
            batch = self.preprocess.finish(batch)
        with autocast(self.config.precision, self.device):
            states = run(**in_format(network_inputs(batch), self.config))
        inputs = _beside_state(batch, samples)
        for (cut, buffer), state, seconds in zip(buffers.items(), states, run.elapsed, strict=True):
            whole: dict[str, Tensor | list[Tensor]] = dict(state)
            tensors = whole if samples is None else self._trimming(cut)(state, samples)
            buffer.put(rows, {f"state.{name}": tensor for name, tensor in tensors.items()})
            buffer.put(rows, inputs)
            costs.forward[cut] = costs.forward.get(cut, 0.0) + seconds
            costs.forward_samples[cut] = costs.forward_samples.get(cut, 0) + len(rows)

    def _by_padding(self, buffers: Buffers) -> Iterator[tuple[bool, Buffers]]:
        """Divide cuts by whether padding may be used: a cut's bytes must not depend on its company."""
        for pads in (True, False):
            alike = {cut: buffer for cut, buffer in buffers.items() if self._trimming(cut).pads is pads}
            if alike:
                yield pads, alike

    def _by_length(self, ragged: list[tuple[int, Sample]], *, pads: bool) -> Iterator[tuple[np.ndarray, list[Sample]]]:
        """Group samples into batches of similar length, or of equal shapes where padding may not be used."""
        ragged = sorted(ragged, key=lambda item: (shapes(item[1]), item[0]))
        batch: list[tuple[int, Sample]] = []
        for item in ragged:
            if len(batch) == self.config.batch_size or (batch and not pads and shapes(batch[0][1]) != shapes(item[1])):
                yield _unzip(batch)
                batch = []
            batch.append(item)
        if batch:
            yield _unzip(batch)

    def _trimming(self, cut: int) -> Trimming:
        """How this cut's states are trimmed, found on the probes."""
        if cut not in self.trimmings:
            samples: list[Sample] = []
            for begin in range(0, len(self.probes), PROBED_AT_ONCE):
                rows = np.sort(self.probes[begin : begin + PROBED_AT_ONCE])
                samples += decode_samples(self.source, self.preprocess, rows)
                if len({shapes(sample) for sample in samples}) > 1:
                    break
            prefix = self.prefixes[cut]

            def run(**batch: Tensor) -> dict[str, Tensor]:
                with autocast(self.config.precision, self.device):
                    on_device = {name: tensor.to(self.device) for name, tensor in network_inputs(batch).items()}
                    return prefix(**in_format(on_device, self.config))

            exact = self.config.precision == "float32"
            self.trimmings[cut] = find_trimming(run, samples, self.preprocess.pad, exact=exact)
        return self.trimmings[cut]

    def _write(self, part: Part, buffers: Buffers, done: Encoded) -> None:
        for cut, buffer in buffers.items():
            start = time.perf_counter()
            rows, tensors = buffer.finish()
            if len(rows):
                keys = done.keyed.keys
                dropped = keys[np.setdiff1d(buffer.rows, rows)]
                info = self.stores[part.view][cut].write_segment(keys[rows], tensors, set_aside=dropped)
                done.promoted[cut].update(info.promoted)
            done.costs.writing[cut] = done.costs.writing.get(cut, 0.0) + time.perf_counter() - start


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model computes in `precision` on `device`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def model_device(prefixes: Sequence[Prefix]) -> torch.device:
    """Return the device of the prefixes' weights; a prefix without any (cut 0) runs wherever its inputs are."""
    return next((tensor.device for prefix in prefixes for tensor in prefix.weights().values()), torch.device("cpu"))


def in_format(batch: dict[str, Tensor], config: EncodeConfig) -> dict[str, Tensor]:
    """Return `batch` in one memory format, whoever stacked it: the format decides in which order a convolution adds."""
    images = torch.channels_last if config.channels_last else torch.contiguous_format
    return {name: t.contiguous(memory_format=images) if t.dim() == 4 else t.contiguous() for name, t in batch.items()}


@contextmanager
def _writer() -> Iterator[ThreadPoolExecutor]:
    """One thread, in which torch uses no more than that thread; what it was given is written at the end.

    Each thread has OpenMP helpers of its own; when there are more of them than cores, OpenMP lets all of them sleep
    between any two kernels, those of the prefix too.
    """
    with ThreadPoolExecutor(1, "segment-writer", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            last = pool.submit(int)  # its turn comes when everything before is written
            try:
                last.result()
            except BaseException:  # torch raises wherever the program is when it hears that a worker has died
                last.result()
                raise


def _beside_state(batch: dict[str, Tensor], samples: list[Sample] | None) -> dict[str, Tensor | list[Tensor]]:
    """What is stored besides the state: ids, masks and extras as they are, of floating-point inputs the shape alone."""
    inputs: dict[str, Tensor | list[Tensor]] = {}
    for name, tensor in batch.items():
        own = list(tensor) if samples is None else [sample[name] for sample in samples]
        if tensor.is_floating_point():
            inputs[f"shape.{name}"] = torch.tensor([list(one.shape) for one in own], dtype=torch.int32)
        else:
            inputs[name if name.startswith(EXTRA) else f"input.{name}"] = tensor if samples is None else own
    return inputs


def _committed(item: tuple[Part, list[BadSample], Future[None]]) -> tuple[Part, list[BadSample]]:
    part, bad, written = item
    written.result()
    return part, bad


def _unzip(batch: list[tuple[int, Sample]]) -> tuple[np.ndarray, list[Sample]]:
    return np.asarray([row for row, _ in batch], np.int64), [sample for _, sample in batch]
