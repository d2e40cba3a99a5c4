"""Encode against the bare prefix: what reading, keying, writing and committing add to the forward passes alone.

Both sides run the same samples, in turn, in one process. Bare: preprocessed batches lie in RAM, texts sorted by length,
and the prefix runs over them in the format that is the fastest here: float32 or bfloat16, contiguous or channels-last.
Encode, in the same format: contents are keyed, then read and preprocessed, states are converted to float16 and written
to a new store, synced to disk. Both are given as a share of what products of large matrices reach in that type.

    python benchmarks/encode.py
    python benchmarks/encode.py --encoder hf:DIRECTORY --texts FAQ.jsonl --batch-tokens 4096
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import Encoding, digits
from PIL import Image

from pipeline.data import Row, Source
from pipeline.device import matrix_peak
from pipeline.encode.config import EncodeConfig
from pipeline.encode.decoding import decode_samples
from pipeline.encode.encoder import compute_format
from pipeline.encode.ragged import Sample, batches_by_length, length, pad_batch, shapes
from pipeline.models import ModelConfig, PreprocessConfig, load, network_inputs
from pipeline.split import compile_blocks
from pipeline.tasks import Head

CPU = torch.device("cpu")


class Photos(Source):
    """Smooth random JPEG files of 320 x 240 pixels, about as large as photos of that size; from 512 on, they recur."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(0)
        self.count, self.files = count, [self._photo(draw) for _ in range(min(count, 512))]

    @staticmethod
    def _photo(draw: np.random.Generator) -> bytes:
        small = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
        file = io.BytesIO()
        small.resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return file.getvalue()

    def __len__(self) -> int:
        return self.count

    def row(self, i: int) -> Row:
        return Row(str(i), None, {"label": i % 2})

    def content(self, i: int) -> bytes:
        return self.files[i % len(self.files)] + i.to_bytes(4, "big")  # behind the image, so that all contents differ


class Texts(Source):
    """The questions and answers of a file of JSON lines."""

    def __init__(self, file: Path, count: int) -> None:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        self.texts = list(dict.fromkeys(line[field] for line in lines for field in ("question", "answer")))[:count]

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, i: int) -> Row:
        return Row(str(i), None, {"label": i % 10})

    def content(self, i: int) -> str:
        text: str = self.texts[i]
        return text


@dataclass(frozen=True)
class Case:
    """A data set and the network that encodes it."""

    name: str
    source: Callable[[], Source]
    model: ModelConfig
    preprocess: PreprocessConfig


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line asks for."""
    if options.encoder is not None:
        name = f"{options.encoder.rpartition('/')[2]}, texts"
        model = ModelConfig(backbone=options.encoder)
        return [Case(name, lambda: Texts(options.texts, options.samples), model, PreprocessConfig(max_length=256))]
    lite0 = ModelConfig(backbone="timm:tf_efficientnet_lite0", weights=None)
    resnet = ModelConfig(backbone="torchvision:resnet34", weights=None)
    sizes = [PreprocessConfig(image_size=options.pixels or size) for size in (96, 224)]
    return [
        Case("EfficientNet-Lite0, digits at 96 px", lambda: digits(options.samples), lite0, sizes[0]),
        Case("ResNet-34, JPEG photos at 224 px", lambda: Photos(options.samples // 4), resnet, sizes[1]),
    ]


class Bench(Encoding):
    """One case in one format, with its batches in RAM."""

    def __init__(self, case: Case, at: float, config: EncodeConfig, dtype: str) -> None:
        head = Head("classes", 10) if case.model.library != "hf" else Head("embedding")
        backbone = load(case.model.model_copy(update={"dtype": dtype}), case.preprocess, head)
        super().__init__(case.source(), backbone, config)
        self.form = compute_format([self.prefix], config)
        self.samples = decode_samples(self.source, backbone.preprocess, np.arange(len(self.source)))
        batches = batches_by_length(self.samples, size=config.batch_size, tokens=config.batch_tokens, pads=True)
        pad = backbone.preprocess.pad
        self.in_memory = [
            self.form.inputs(network_inputs(pad_batch([self.samples[i] for i in batch], pad))) for batch in batches
        ]

    @property
    def name(self) -> str:
        """The format."""
        parts = [self.form.precision, *(["channels-last"] if self.form.channels_last else [])]
        return ", ".join([*parts, *(["compiled"] if self.config.compile else [])])

    @property
    def operations(self) -> float:
        """Operations of the prefix on all samples, with the padding of their batches."""
        if self.flops is None:
            raise SystemExit("the operations of this network cannot be counted")
        if len({shapes(sample) for sample in self.samples}) == 1:
            return self.flops[0][0] * len(self.samples)
        padded = sum(next(iter(batch.values())).shape[:2].numel() for batch in self.in_memory)
        return self.flops[0][0] * padded / max(map(length, self.samples[:2]))

    def bare(self, batches: Sequence[Sample]) -> float:
        """Return the seconds of the bare prefix on some batches."""
        start = time.perf_counter()
        for batch in batches:
            self.prefix(**batch)
        return time.perf_counter() - start

    def whole(self) -> float:
        """Return the seconds of encoding all samples into a new store."""
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            self.encode(Path(folder) / "store")
            return time.perf_counter() - start


def fastest(case: Case, at: float, options: argparse.Namespace) -> Bench:
    """Return the case in the format in which the bare prefix is the fastest here."""
    found: list[tuple[float, Bench]] = []
    dtypes = ["float32", *(["bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    layouts = [False, True] if options.encoder is None else [False]
    for dtype, channels_last, compiled in itertools.product(dtypes, layouts, {False, options.compile}):
        config = EncodeConfig(
            cuts=[at],
            workers=options.workers,
            channels_last=channels_last,
            batch_tokens=options.batch_tokens,
            segment_samples=options.segment_samples,
            compile=compiled,
        )
        bench = Bench(case, at, config, dtype)
        few = bench.in_memory[:: max(1, len(bench.in_memory) // 8)]
        if compiled:
            compile_blocks([bench.prefix])
        bench.bare(few if compiled else few[:1])
        found.append((min(bench.bare(few) for _ in range(2)), bench))
        print(f"  {case.name} at {at}: {bench.name}, {found[-1][0]:.3g} s", flush=True)
    return min(found, key=lambda item: item[0])[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None, help="processes that read and preprocess")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--pixels", type=int, help="size of the images, where it is not to be the case's own")
    parser.add_argument("--encoder", help="a network of texts (hf:DIRECTORY), in place of those of images")
    parser.add_argument("--texts", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--batch-tokens", type=int, help="as encode.batch_tokens")
    parser.add_argument("--segment-samples", type=int, default=512, help="as encode.segment_samples")
    parser.add_argument("--compile", action="store_true", help="try compiled blocks, too: encode.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args()


def main() -> None:
    """Print both rates, their ratio and their shares of the peak for each case and cut."""
    options = parse()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} torch threads, workers {options.workers}, medians of {options.repeats}")
    rows = []
    for case, at in itertools.product(cases(options), options.cuts):
        bench = fastest(case, at, options)
        seconds = [(bench.bare(bench.in_memory), bench.whole()) for _ in range(options.repeats + 1)][1:]
        bare, whole = (statistics.median(side) for side in zip(*seconds, strict=True))
        peak = matrix_peak(CPU, bench.form.compute_dtype)
        shares = [bench.operations / side / peak for side in (bare, whole)]
        rates = [len(bench.samples) / side for side in (bare, whole)]
        rows.append(
            f"{case.name:36} {at:4} {bench.name:24} {rates[0]:10.1f} {rates[1]:10.1f} {bare / whole:6.3f} "
            f"{shares[0]:6.3f} {shares[1]:6.3f} {peak / 1e9:8.0f}"
        )
    print(
        f"{'case':36} {'cut':>4} {'format':24} {'bare /s':>10} {'encode /s':>10} ratio  of peak: bare, encode  GFLOP/s"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
