"""Units of samples -> segments: the inner loop of encode, which every executor runs.

Three things overlap: worker processes read and preprocess, this process runs the prefix, and a thread writes segments.
On an accelerator, so do the copies to it and from it.
"""

import itertools
import logging
import operator
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.data.source import Source
from pipeline.encode.config import EncodeConfig
from pipeline.encode.decoding import Chunk, Decoded, decode, decode_samples, finish_sample
from pipeline.encode.quarantine import BadSample, name_of
from pipeline.encode.ragged import (
    TOLERANCE,
    Sample,
    Trimming,
    batches_by_length,
    find_trimming,
    length,
    pad_batch,
    shapes,
    token_count,
)
from pipeline.encode.transfer import Named, Transfer
from pipeline.encode.unit import EncodeCosts, Outcome, Unit, UnitBuffer
from pipeline.errors import InputRefusedError, ModelError
from pipeline.models import EXTRA, Preprocess, network_inputs
from pipeline.precision import ComputeFormat, weights_dtype
from pipeline.split import Capture, Prefix, State, compile_blocks, run_together
from pipeline.split.layout import sample_tolerance
from pipeline.store import Store

log = logging.getLogger("recycle")

Buffers: TypeAlias = dict[int, UnitBuffer]
"""The tensors of one part at each of its cuts, by the number of the cut."""

TRIMMED_AT_ONCE = 4
PARTS_IN_FLIGHT = 2
"""Number of finished parts that may wait for the writer; with the part being computed they bound the memory."""
INFINITE = "its state holds NaN or infinity"


class Encoder:
    """Runs units; a unit gives the same segments in every process."""

    def __init__(
        self,
        source: Source,
        views: Sequence[Preprocess],
        prefixes: Sequence[Prefix],
        stores: Sequence[Sequence[Store]],
        config: EncodeConfig,
        trimming_rows: np.ndarray,
    ) -> None:
        """Prepare to run units into `stores[view][cut]`.

        The first of the rows `trimming_rows` with unequal shapes decide how ragged states are trimmed.
        """
        self.source, self.views, self.trimming_rows = source, views, trimming_rows
        self.preprocess = views[0]  # for what all views share
        self.prefixes, self.stores, self.config = prefixes, stores, config
        self.format = compute_format(prefixes, config)
        self.transfer = Transfer(self.format.device)
        self.trimmings: dict[int, Trimming] = {}
        if config.compile:
            log.info("%d blocks are compiled", compile_blocks(prefixes))

    def run(self, units: Sequence[Unit], begin: Callable[[int], None] | None = None) -> Generator[Outcome, None, None]:
        """Encode `units`; yield the outcome of each part, in order, once its segments are committed.

        `begin` is called with the index of a unit before its first sample is computed.
        """
        chunks_of_units = [self._chunks(unit) for unit in units]
        decoded = decode(self.source, list(itertools.chain.from_iterable(chunks_of_units)), workers=self.workers)
        waiting: list[Future[Outcome]] = []
        with _writer() as pool, self.transfer:

            def commit(outcome: Outcome, buffers: Buffers) -> None:
                infinite = set().union(*(buffer.infinite for buffer in buffers.values()))
                outcome.bad += [BadSample(row, name_of(self.source, row), INFINITE) for row in sorted(infinite)]
                waiting.append(pool.submit(self._write, outcome, buffers))

            for place, (unit, chunks) in enumerate(zip(units, chunks_of_units, strict=True)):
                if begin:
                    begin(place)
                # What the first part takes as it comes is kept for the others: preprocessed images are small.
                of_unit = itertools.tee(itertools.islice(decoded, len(chunks)), len(unit.parts))
                for number, (part, in_views) in enumerate(zip(unit.parts, of_unit, strict=True)):
                    outcome = Outcome(part)
                    buffers = self._encode(outcome, map(operator.itemgetter(number), in_views))
                    self.transfer.after(partial(commit, outcome, buffers))
                    while len(waiting) > PARTS_IN_FLIGHT:
                        yield waiting.pop(0).result()
            self.transfer.finish()
            while waiting:
                yield waiting.pop(0).result()

    def holds(self, unit: Unit) -> bool:
        """Return whether the whole unit is committed, without a sample set aside."""
        return all(self.stores[view][cut].holds(unit.keys) for view, cut in unit.stores)

    def _chunks(self, unit: Unit) -> list[Chunk]:
        """Divide the rows of a unit into batches, each in the views of the unit's parts."""
        size, views = self.config.batch_size, [self.views[part.view] for part in unit.parts]
        return [
            Chunk(unit.rows[begin : begin + size], views, unit.keys[begin : begin + size])
            for begin in range(0, len(unit.rows), size)
        ]

    @property
    def workers(self) -> int:
        """Processes that read and preprocess."""
        if self.config.workers is not None:
            return self.config.workers
        return 0 if self.format.device.type == "cpu" else torch.get_num_threads()

    def _encode(self, outcome: Outcome, decoded: Iterator[Decoded]) -> Buffers:
        """Run the prefix over one part: batch by batch, or all batches section by section."""
        buffers = {cut: UnitBuffer(outcome.part.rows) for cut in outcome.part.cuts}
        forwards = self._forwards(outcome, buffers, decoded)
        run_together(self.prefixes[0].model, forwards, self.config.memory_gb * 1e9)
        return buffers

    def _forwards(self, outcome: Outcome, buffers: Buffers, decoded: Iterator[Decoded]) -> Iterator[Callable[[], None]]:
        """Yield the forward passes of one part; samples of unequal shapes are batched by length at its end."""
        part, costs = outcome.part, outcome.costs
        ragged, rows_of = list[Sample](), list[int]()
        for _ in range(0, len(part.rows), self.config.batch_size):
            start = time.perf_counter()
            chunk = next(decoded)
            costs.reading += time.perf_counter() - start
            outcome.bad += chunk.bad
            outcome.cut_off += chunk.cut_off
            if isinstance(chunk.inputs, dict):
                count = token_count(chunk.inputs)
                costs.positions, costs.padded = costs.positions + count, costs.padded + count
                yield partial(self._forward, buffers, chunk.rows, chunk.inputs, None, costs)
            else:
                ragged += [finish_sample(self.preprocess, sample) for sample in chunk.inputs]
                rows_of += chunk.rows.tolist()
        for pads in (True, False) if ragged else ():
            # Whether padding may be used differs by cut, and the bytes of a cut must not depend on the other cuts.
            alike = {cut: buffer for cut, buffer in buffers.items() if self._trimming(cut).pads is pads}
            size, tokens = self.config.batch_size, self.config.batch_tokens
            for batch in batches_by_length(ragged, size=size, tokens=tokens, pads=pads) if alike else ():
                rows, samples = np.asarray([rows_of[i] for i in batch], np.int64), [ragged[i] for i in batch]
                yield partial(self._forward, alike, rows, pad_batch(samples, self.preprocess.pad), samples, costs)
                if part.cuts[-1] in alike:
                    costs.padded += len(batch) * max(map(length, samples))
        costs.samples += len(part.rows)
        costs.positions += sum(map(length, ragged))

    def _forward(
        self, buffers: Buffers, rows: np.ndarray, batch: Sample, samples: list[Sample] | None, costs: EncodeCosts
    ) -> None:
        """Add the states of a batch, and what is stored beside them; of unequal `samples`, each without padding."""
        run = Capture([self.prefixes[cut] for cut in buffers])
        batch = self.transfer.to_device(batch)
        if samples is None:
            batch = self.preprocess.finish(batch)
        states = self._run(run, rows, network_inputs(batch))

        def put(on_host: Sequence[Named]) -> None:
            *states, inputs = on_host
            for (cut, buffer), state, seconds in zip(buffers.items(), states, run.elapsed, strict=True):
                tensors = state if samples is None else self._trimming(cut)(state, samples)
                buffer.put(rows, {f"state.{name}": tensor for name, tensor in tensors.items()})
                buffer.put(rows, inputs)
                costs.forward[cut] = costs.forward.get(cut, 0.0) + seconds
                costs.forward_samples[cut] = costs.forward_samples.get(cut, 0) + len(rows)

        self.transfer.to_host([*states, _beside_state(batch, samples)], put)

    def _run(self, run: Capture, rows: np.ndarray, batch: dict[str, Tensor]) -> list[State]:
        """Return the states of a batch, or raise ModelError, which names the sample that the network refuses."""
        try:
            return self.format.run(run, batch)
        except InputRefusedError as error:
            for number, row in enumerate(rows.tolist()):
                try:
                    self.format.run(run, {name: tensor[number : number + 1] for name, tensor in batch.items()})
                except InputRefusedError as own:
                    raise ModelError(f"{name_of(self.source, row)}: {own}; {self.preprocess.advice()}") from own
            raise ModelError(f"{error}; {self.preprocess.advice()}") from error

    def _trimming(self, cut: int) -> Trimming:
        """Return how the states of a cut are trimmed, determined on some samples."""
        if cut not in self.trimmings:
            samples: list[Sample] = []
            for begin in range(0, len(self.trimming_rows), TRIMMED_AT_ONCE):
                rows = np.sort(self.trimming_rows[begin : begin + TRIMMED_AT_ONCE])
                samples += decode_samples(self.source, self.preprocess, rows)
                if len({shapes(sample) for sample in samples}) > 1:
                    break

            def prefix(**batch: Tensor) -> State:
                return self.format.run(self.prefixes[cut], network_inputs(batch))

            is_float32 = self.format.precision == "float32"
            tolerance = TOLERANCE if is_float32 else sample_tolerance(self.format.compute_dtype)
            run = partial(run_together, self.prefixes[cut].model)
            self.trimmings[cut] = find_trimming(prefix, samples, self.preprocess.pad, tolerance=tolerance, run=run)
        return self.trimmings[cut]

    def _write(self, outcome: Outcome, buffers: Buffers) -> Outcome:
        part, bad = outcome.part, {sample.row for sample in outcome.bad}
        for cut, buffer in buffers.items():
            start = time.perf_counter()
            rows, tensors = buffer.finish(bad)
            if len(rows):
                kept = np.isin(part.rows, rows)
                store = self.stores[part.view][cut]
                outcome.promoted[cut] = store.write_segment(part.keys[kept], tensors, part.keys[~kept]).promoted
            outcome.costs.writing[cut] = time.perf_counter() - start
        return outcome


def compute_format(prefixes: Sequence[Prefix], config: EncodeConfig) -> ComputeFormat:
    """Return the format in which `prefixes` of one model compute, on the device of their weights.

    A prefix without any (cut 0) computes on the CPU, where its inputs are.
    """
    device = next((item.device for prefix in prefixes for item in prefix.weights().values()), torch.device("cpu"))
    weights = weights_dtype(prefixes[0].model.parameters())
    return ComputeFormat.of(device, weights, config.precision, channels_last=config.channels_last)


@contextmanager
def _writer() -> Iterator[ThreadPoolExecutor]:
    """Give an executor with one thread, in which torch runs single-threaded; pending writes finish at the end.

    Each thread has its own OpenMP workers; with more of them than cores, OpenMP lets all of them sleep between any two
    kernels, those of the prefix included.
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
    """Return the inputs to store beside the state: ids, masks and extras, and the shapes of floating-point inputs."""
    inputs: dict[str, Tensor | list[Tensor]] = {}
    for name, tensor in batch.items():
        own = list(tensor) if samples is None else [sample[name] for sample in samples]
        if tensor.is_floating_point():
            inputs[f"shape.{name}"] = torch.tensor([list(one.shape) for one in own], dtype=torch.int32)
        else:
            inputs[name if name.startswith(EXTRA) else f"input.{name}"] = tensor if samples is None else own
    return inputs
