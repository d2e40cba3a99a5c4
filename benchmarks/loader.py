"""Random batches: this loader, a tensor in RAM, and Hugging Face datasets, side by side in one run.

    python benchmarks/loader.py                       # 4,096 samples of 256x14x14 fp16, batches of 64

Every reader gives the same random batches, with labels, as torch tensors on the CPU, from a warm page cache. A round is
one epoch of each, one after the other, so that what else the machine does meets all of them; shown are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.keys import Recipe
from pipeline.loader import Loader
from pipeline.order import batches
from pipeline.store import FORMAT, Store

SHAPE = (256, 14, 14)
SEGMENT = 512
RAM, HF, OURS = "tensor in RAM, index", "HF datasets, torch format", "recycling loader"
TARGETS = {RAM: 1.0, HF: 3.0}

Order = Callable[[int], list[np.ndarray]]
Reader = Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""Epoch -> its batches of states and labels."""


def main() -> None:
    """Print samples per second of each reader, and this loader's ratio to each."""
    options = parse()
    torch.set_num_threads(options.threads)
    labels = np.arange(options.samples) % 100

    def order(epoch: int) -> list[np.ndarray]:
        return batches(np.arange(options.samples), options.batch, seed=0, epoch=epoch, shuffle=True, drop_last=True)

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        states = np.random.default_rng(0).standard_normal((options.samples, *SHAPE), np.float32).astype(np.float16)
        readers = {OURS: ours(Path(folder, "store"), states, labels, order), RAM: in_ram(states, labels, order)}
        if not options.no_datasets:
            readers[HF] = hf_datasets(Path(folder, "arrow"), states, labels, order)
        check_alike(readers)
        rates = measure(readers, options.rounds)
    print_table(rates, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--dir", type=Path, help="where the stores are made, and removed again")
    parser.add_argument("--no-datasets", action="store_true", help="leave Hugging Face datasets out")
    return parser.parse_args()


def ours(path: Path, states: np.ndarray, labels: np.ndarray, order: Order) -> Reader:
    store = Store.create(path, Recipe(FORMAT, "", "", "", {}, None, "float32", "raw:float16"))
    keys = np.random.default_rng(1).integers(0, 256, (len(states), 16), dtype=np.uint8)
    for begin in range(0, len(states), SEGMENT):
        part = slice(begin, begin + SEGMENT)
        store.write_segment(keys[part], {"state.hidden": states[part]})

    loader = Loader(store, keys, {"label": labels}, order)

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader.set_epoch(epoch)
        for batch in loader:
            yield batch.state["hidden"], batch.targets["label"]

    return read


def in_ram(states: np.ndarray, labels: np.ndarray, order: Order) -> Reader:
    states_tensor, labels_tensor = torch.from_numpy(states), torch.from_numpy(labels)

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order(epoch):
            index = torch.from_numpy(rows)
            yield states_tensor[index], labels_tensor[index]

    return read


def hf_datasets(path: Path, states: np.ndarray, labels: np.ndarray, order: Order) -> Reader:
    import datasets  # noqa: PLC0415  (a development dependency, and slow to import)

    features = datasets.Features({"hidden": datasets.Array3D(SHAPE, "float16"), "label": datasets.Value("int64")})
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=features) as writer:
        for begin in range(0, len(states), SEGMENT):
            part = slice(begin, begin + SEGMENT)
            writer.write_batch({"hidden": list(states[part]), "label": labels[part].tolist()})
        writer.finalize()
    table = datasets.Dataset.from_file(str(path)).with_format("torch")

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order(epoch):
            batch = table[rows.tolist()]
            yield batch["hidden"], batch["label"]

    return read


def check_alike(readers: dict[str, Reader]) -> None:
    """A race between readers of different data would mean nothing: compare one batch, sample by sample."""
    sums = {name: {float(state.double().sum()) for state in next(read(0))[0]} for name, read in readers.items()}
    if any(found != sums[OURS] for found in sums.values()):
        raise SystemExit(f"the readers give different samples: {sums}")


def measure(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for epoch in range(rounds + 1):  # the first warms caches and allocators
        for name, read in readers.items():
            begin = time.perf_counter()
            count = sum(len(labels) for _, labels in read(epoch))
            if epoch:
                rates[name].append(count / (time.perf_counter() - begin))
    return rates


def print_table(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{options.samples} samples of {'x'.join(map(str, SHAPE))} fp16, batches of {options.batch}, random order,")
    print(
        f"{options.threads} torch threads, no worker processes, warm cache, median (range) of {options.rounds} rounds\n"
    )
    print("| reader | samples/s | range | recycling loader is | target |")
    print("|---|---|---|---|---|")
    for name, rate in medians.items():
        spread = f"{min(rates[name]):,.0f}-{max(rates[name]):,.0f}"
        ratio = "" if name == OURS else f"{medians[OURS] / rate:.2f}x"
        target = f">= {TARGETS[name]:.1f}x" if name in TARGETS else ""
        print(f"| {name} | {rate:,.0f} | {spread} | {ratio} | {target} |")


if __name__ == "__main__":
    main()
