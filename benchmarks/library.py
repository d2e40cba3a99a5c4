"""The library's data sets and loader beside the project's own loader: python benchmarks/library.py

One store of digits encoded once, by EfficientNet-Lite0 cut in the middle; all read the same shuffled batches of it,
and take turns. Shown are the medians in samples per second, and each as a share of the project's loader.

    project     `Loader`, as `recycle train` reads
    loader      `store.loader()`
    DataLoader  a plain one over `store.dataset()`, 0 workers
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import timm
import torch
from common import digits
from torch.utils.data import DataLoader

import layer_recycling as lr
from pipeline.train import order
from pipeline.train.loader import Loader, StoredRows


def main() -> None:
    """Print a line per way to read, for states of three sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    source = digits(options.samples)
    images = [torch.from_numpy(np.asarray(source.content(i), np.float32) / 255) for i in range(len(source))]
    side = 96
    items = [
        (torch.nn.functional.interpolate(image.view(1, 1, 28, 28), side)[0].expand(3, side, side).clone(), i % 10)
        for i, image in enumerate(images)
    ]
    model = timm.create_model("efficientnet_lite0", num_classes=10)
    example = torch.stack([image for image, _ in items[:4]])
    print(f"{'cut':>5} {'bytes':>8} {'way':>11} {'samples/s':>10} {'of project':>11}")
    for cut in (0.25, 0.5, 0.75):
        prefix, _ = lr.split(model, cut, example)
        with tempfile.TemporaryDirectory() as folder:
            store = lr.encode(items, prefix, folder)
            size = sum(spec.dtype.itemsize // 2 * int(np.prod(spec.shape)) for spec in prefix.spec.values())
            show(cut, size, ways(store), len(items), options.rounds)


def ways(store: lr.StateStore) -> dict[str, Callable[[int], Iterable[object]]]:
    """Return what iterates over an epoch, by name."""
    rows = np.arange(len(store))
    label = next(iter(store.table.columns.values())).values
    assert isinstance(label, torch.Tensor)

    def batches(epoch: int) -> list[np.ndarray]:
        return order.batches(rows, 64, seed=0, epoch=epoch, shuffle=True)

    own = Loader(StoredRows(store.places, store._reader), {"label": label.numpy()}, batches)
    loader = store.loader(64, shuffle=True)

    def project(epoch: int) -> Iterable[object]:
        own.set_epoch(epoch)
        return own

    return {
        "project": project,
        "loader": lambda _: loader,
        "DataLoader": lambda _: DataLoader(store.dataset(), 64, shuffle=True, collate_fn=store.collate),
    }


def show(cut: float, size: int, found: dict[str, Callable[[int], Iterable[object]]], samples: int, rounds: int) -> None:
    """Measure an epoch of each, in turns, and print them."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for epoch in range(rounds + 1):
        for name, way in found.items():
            start = time.perf_counter()
            for _ in way(epoch):
                pass
            if epoch:
                times[name].append(time.perf_counter() - start)
    rates = {name: samples / statistics.median(seconds) for name, seconds in times.items()}
    for name, rate in rates.items():
        print(f"{cut:5} {size:8} {name:>11} {rate:10.0f} {rate / rates['project']:11.2f}", flush=True)


if __name__ == "__main__":
    main()
