"""A network on its device, split at the deepest cut, that runs samples under several settings."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data import SampleTable, Source
from pipeline.encode import quarantine
from pipeline.encode.decoding import Chunk, decode_rows, finished_samples
from pipeline.encode.ragged import Sample, length, pad_batch, shapes
from pipeline.errors import DataError
from pipeline.models import network_inputs
from pipeline.precision import ComputeFormat
from pipeline.project import Project
from pipeline.project.extrapolation import predict_lengths
from pipeline.project.model import LoadedModel
from pipeline.split import Prefix, Suffix, places
from pipeline.split.forward import synchronise

SECONDS_EACH, REPEATS = 0.5, 3
"""Time, and number of forward passes, after which a size of batches is timed."""


@dataclass(frozen=True)
class TrialNetwork:
    """A network on its device, split at the deepest cut, with samples to run it on."""

    loaded: LoadedModel
    prefix: Prefix
    suffix: Suffix
    """The layers after the cut, with a copy of their weights in float32."""
    samples: list[Sample]
    rows: np.ndarray
    """Rows of the samples in the source."""
    device: torch.device
    originals: Mapping[str, Tensor]
    """The floating-point tensors of the network as they came, by name."""

    @classmethod
    def open(cls, part: Project, source: Source, table: SampleTable, rows: np.ndarray) -> "TrialNetwork":
        """Build the network of one encoder, and read `rows` (n,) of `source`.

        Raises:
            DataError: none of them can be decoded.
        """
        loaded = LoadedModel.open(part, table)
        device, preprocess = loaded.to_device(), loaded.backbone.preprocess
        (decoded,) = decode_rows(source, Chunk(rows, [preprocess]))
        samples = finished_samples(preprocess, decoded)
        if not samples:
            raise DataError(f"none of {len(rows)} samples can be decoded: {quarantine.summary(decoded.bad)}")
        by_length = sorted(samples, key=length)
        example = loaded.on_device([by_length[0], by_length[-1]])
        named = [part.at(cut) for cut in part.encode.cuts]
        shares = [cut.share for cut in places(loaded.backbone.model, named, example)]
        prefix, suffix = loaded.split(named[int(np.argmax(shares))], example)
        state = loaded.backbone.model.state_dict(keep_vars=True)
        originals = {name: item.data for name, item in state.items() if item.is_floating_point()}
        return cls(loaded, prefix, suffix.float().eval(), samples, decoded.rows, device, originals)

    def format(self, precision: str | None, *, channels_last: bool) -> ComputeFormat:
        """Have the network hold its weights and compute in `precision`, None for what params.yaml says."""
        model = self.loaded.backbone.model
        for name, item in model.state_dict(keep_vars=True).items():
            if name in self.originals:
                item.data = self.originals[name] if precision is None else self.originals[name].to(dtype_of(precision))
        model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        weights = self.loaded.backbone.dtype if precision is None else dtype_of(precision)
        own = self.loaded.project.encode.precision if precision is None else None
        return ComputeFormat.of(self.device, weights, own, channels_last=channels_last)

    def batch(self, count: int) -> dict[str, Tensor]:
        """Return `count` of the samples, of similar lengths, as a batch."""
        by_length = sorted(self.samples, key=length)
        begin = (len(by_length) - count) // 2
        return network_inputs(pad_batch(by_length[begin : begin + count], self.loaded.backbone.preprocess.pad))

    def seconds(self, form: ComputeFormat, count: int) -> float:
        """Return the least of some times of a forward pass over `count` samples, after a warm-up."""
        batch, times = self.batch(count), list[float]()
        while len(times) <= REPEATS and sum(times) < SECONDS_EACH:
            began = time.perf_counter()
            form.run(self.prefix, batch)
            synchronise(self.device)
            times.append(time.perf_counter() - began)
        return min(times[1:] or times)

    def lengths(self, sizes: np.ndarray) -> np.ndarray:
        """Return the positions of each row, (N,) int64; `sizes` (N,) are those of the contents."""
        if len({shapes(sample) for sample in self.samples}) == 1:
            return np.ones(len(sizes), np.int64)
        return predict_lengths(sizes, self.rows, [length(sample) for sample in self.samples])


def dtype_of(precision: str) -> torch.dtype:
    """Return the type called `precision`."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
