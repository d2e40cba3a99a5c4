"""Does training from a large store take more memory than from a small one? Memory maps must not count.

    python benchmarks/memory.py                       # a 0.4 GB and a 4 GB store, made in --dir and removed again

Each store is trained from in a process of its own, for one epoch; shown is the largest anonymous memory (RssAnon of
/proc/self/status) met after a batch. Pages of the store in the page cache belong to the system and are not counted.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import apart, new_store, status
from torch import nn

from pipeline.store import Reader, Store
from pipeline.train.loader import Loader, StoredRows
from pipeline.train.order import batches

SHAPE = (256, 14, 14)
SEGMENT = 512
BATCH = 64
SAMPLE_BYTES = int(np.prod(SHAPE)) * 2
TARGET_GB = 1.0


def main() -> None:
    """Print the anonymous memory of training from each store, and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs=2, default=[0.4, 4.0], help="sizes of the stores")
    parser.add_argument("--dir", type=Path, help="where the stores are made, and removed again")
    options = parser.parse_args()
    anonymous = []
    print("| store | samples | RssAnon at the start | largest RssAnon in training | steps |")
    print("|---|---|---|---|---|")
    for size in options.gb:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            samples = int(size * 1e9 / SAMPLE_BYTES)
            apart(make, Path(folder, "store"), samples)
            start, largest, steps = apart(train, Path(folder, "store"))
        anonymous.append(largest)
        print(f"| {size:.1f} GB | {samples:,} | {start / 1e9:.2f} GB | {largest / 1e9:.2f} GB | {steps} |", flush=True)
    difference = (anonymous[1] - anonymous[0]) / 1e9
    print(f"\ndifference {difference:+.2f} GB (target: within {TARGET_GB:.1f} GB)")


def make(path: Path, samples: int) -> None:
    store = new_store(path)
    noise = np.random.default_rng(0).standard_normal((SEGMENT, *SHAPE), np.float32).astype(np.float16)
    for begin in range(0, samples, SEGMENT):
        count = min(SEGMENT, samples - begin)
        keys = np.zeros((count, 16), np.uint8)
        keys[:, :8] = np.arange(begin, begin + count, dtype=np.uint64)[:, None].view(np.uint8)
        store.write_segment(keys, {"state.hidden": noise[:count]})


def train(path: Path) -> tuple[int, int, int]:
    """One epoch of a small suffix; return RssAnon before it, the largest after a step, and the number of steps."""
    torch.manual_seed(0)
    store = Store.open(path)
    keys = store.keys()
    suffix = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(SHAPE[0], 10))
    optimizer = torch.optim.AdamW(suffix.parameters())
    start, largest = status("RssAnon"), 0
    order = batches(np.arange(len(keys)), BATCH, seed=0, epoch=0, shuffle=True)
    for batch in Loader(StoredRows(store.rows(keys), Reader(store.path)), {"label": np.arange(len(keys)) % 10}, order):
        loss = nn.functional.cross_entropy(suffix(batch.state["hidden"].float()), batch.targets["label"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        largest = max(largest, status("RssAnon"))
    return start, largest, len(order)


if __name__ == "__main__":
    main()
