"""Encode against the bare prefix: what reading, keying, writing and committing add to the forward passes alone.

Both sides run the same samples in the same batches, in turn, in one process. Bare: preprocessed batches lie in RAM and
the prefix runs over them. Encode: contents are keyed, then read and preprocessed by a worker process, states are
converted to float16 and written to a new store, synced to disk.

    python benchmarks/encode.py
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Encoding, digits
from PIL import Image

from pipeline.data import Row, Source
from pipeline.encode.config import EncodeConfig
from pipeline.models import ModelConfig, PreprocessConfig, load
from pipeline.tasks import Head


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


CASES: dict[str, tuple[Callable[[int], Source], ModelConfig, int]] = {
    "EfficientNet-Lite0, digits at 96 px": (
        digits,
        ModelConfig(backbone="timm:tf_efficientnet_lite0", weights=None),
        96,
    ),
    "ResNet-34, JPEG photos at 224 px": (Photos, ModelConfig(backbone="torchvision:resnet34", weights=None), 224),
}


def measure(
    source: Source, model: ModelConfig, size: int, at: float, options: argparse.Namespace
) -> tuple[float, float]:
    """Return samples per second of the bare prefix and of encode: medians."""
    backbone = load(model, PreprocessConfig(image_size=size), Head("classes", 10))
    encoding = Encoding(source, backbone, EncodeConfig(cuts=[at], workers=options.workers))
    batches = list(encoding.batches())
    bare, whole = [], []
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        for batch in batches:
            encoding.prefix(**batch)
        middle = time.perf_counter()
        folder = Path(tempfile.mkdtemp())
        encoding.encode(folder / "store")
        end = time.perf_counter()
        shutil.rmtree(folder)
        if repeat:
            bare.append(len(source) / (middle - start))
            whole.append(len(source) / (end - middle))
    return statistics.median(bare), statistics.median(whole)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None, help="processes that read and preprocess")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--pixels", type=int, help="size of the images, where it is not to be the case's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args()


def main() -> None:
    """Print both rates and their ratio for each case and cut."""
    options = parse()
    torch.set_num_threads(options.threads)
    print(
        f"{options.samples} samples (a quarter at 224 px), batch 64, {options.threads} torch threads, "
        f"workers {options.workers}, medians of {options.repeats}"
    )
    print(f"{'case':38} {'cut':>5} {'bare prefix /s':>15} {'encode /s':>12} {'ratio':>7}")
    for name, (make, model, size) in CASES.items():
        source = make(options.samples if size < 200 else options.samples // 4)
        for at in options.cuts:
            bare, whole = measure(source, model, options.pixels or size, at, options)
            print(f"{name:38} {at:5} {bare:15.1f} {whole:12.1f} {whole / bare:7.3f}", flush=True)


if __name__ == "__main__":
    main()
