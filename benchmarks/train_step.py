"""Training steps fed from the store against the same steps fed from RAM.

EfficientNet-Lite0 on digits at 96 px: forward, backward and AdamW of the suffix, batches of 64. RAM: the very
batches, read beforehand. Epochs of both alternate in one process; shown are medians of steps per second.

    python benchmarks/train_step.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from common import DIGITS, Encoding, digits

from pipeline.data import build
from pipeline.encode.config import EncodeConfig
from pipeline.models import ModelConfig, PreprocessConfig, load
from pipeline.store import Reader
from pipeline.tasks import Head, TaskConfig, open_task
from pipeline.train import order
from pipeline.train.loader import Batch, Loader, StoredRows
from pipeline.train.objective import Objective


def main() -> None:
    """Print both rates and their ratio for each cut."""
    options = parse()
    torch.set_num_threads(options.threads)
    print(
        f"batch {options.batch}, {options.threads} torch threads, medians of {options.rounds} x {options.steps} steps"
    )
    print(f"{'cut':>5} {'RAM, steps/s':>14} {'store, steps/s':>16} {'ratio':>7}")
    for cut in options.cuts:
        ram, store = measure(cut, options)
        print(f"{cut:5} {ram:14.2f} {store:16.2f} {store / ram:7.3f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="batches of an epoch")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--pixels", type=int, default=96, help="size of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args()


def measure(cut: float, options: argparse.Namespace) -> tuple[float, float]:
    """Return steps per second fed from RAM and fed from the store: medians."""
    source = digits(options.steps * options.batch)
    model = ModelConfig(backbone="timm:tf_efficientnet_lite0", weights=None)
    backbone = load(model, PreprocessConfig(image_size=options.pixels), Head("classes", 10))
    encoding = Encoding(source, backbone, EncodeConfig(cuts=[cut]))
    with tempfile.TemporaryDirectory() as folder:
        store = encoding.encode(Path(folder, "store"))
        table, task = build(source, encoding.result.keyed.keys, DIGITS), open_task(TaskConfig())
        batches = order.batches(np.arange(len(table)), options.batch, seed=0, epoch=0, shuffle=True)
        loader = Loader(StoredRows(store.rows(table.keys), Reader(store.path)), task.prepare(table), batches)
        in_ram = list(loader)
        objective = Objective(encoding.suffix, task).train()
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
        rates: dict[str, list[float]] = {"ram": [], "store": []}
        for round_ in range(options.rounds + 1):
            for name, feed in (("ram", in_ram), ("store", loader)):
                rate = steps_per_second(objective, optimizer, feed)
                rates[name] += [rate] if round_ else []
    return statistics.median(rates["ram"]), statistics.median(rates["store"])


def steps_per_second(objective: Objective, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> float:
    """Train on `batches` once."""
    start, count = time.perf_counter(), 0
    for batch in batches:
        objective(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
