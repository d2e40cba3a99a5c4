"""Does a large store open, plan and load within its bounds of time and memory?

    python benchmarks/scale.py                 # makes stores of 0.2, 0.6 and 2 GB in --dir, and removes them again

Each part runs in a process of its own. Memory is what the process takes beyond its imports: resident memory (VmHWM) for
opening and planning, anonymous memory (RssAnon) for epochs. Pages of the store belong to the page cache: the system
takes them back when a limit is near, so what has to stay below the limit is the anonymous memory.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
from measuring import apart, new_store, status

from pipeline.encode.unit import plan
from pipeline.memory import keep_freed_memory
from pipeline.store import Reader, Store, segment_id
from pipeline.train.loader import Loader, StoredRows
from pipeline.train.order import batches

SEGMENT = 500
BATCH = 64
TINY = 4
SHAPE = (256, 14, 14)


def main() -> None:
    """Print what opening, planning and an epoch take, beside their bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the store that is opened")
    parser.add_argument("--keys", type=int, default=10_000_000, help="that are planned against a store that has them")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the store that is loaded")
    parser.add_argument("--dir", type=Path, help="where the stores are made, and removed again")
    options = parser.parse_args()
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| what | measured | bound |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder, "many")
        apart(make_tiny, path, options.samples)
        seconds, memory = apart(first_batch, path)
        print(
            f"| open a store of {options.samples:,} samples, first batch of {BATCH} | {seconds:.2f} s, "
            f"{memory / 1e6:.0f} MB | 1 s, 200 MB |",
            flush=True,
        )
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder, "full")
        apart(make_tiny, path, options.keys, True)
        seconds, memory = apart(plan_all, path, options.keys)
        print(
            f"| plan {options.keys:,} keys, all stored | {seconds:.1f} s, {memory / 1e9:.2f} GB | 30 s, 1 GB |",
            flush=True,
        )
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder, "large")
        apart(make_large, path, options.gb)
        peak, grown, mapped = apart(epochs, path)
        print(
            f"| two epochs of a store of {options.gb:.1f} GB | {peak / 1e6:.0f} MB anonymous in the first, "
            f"{grown / 1e6:+.0f} MB in the second, {mapped / 1e6:.0f} MB in the store's maps | "
            f"a limit of {options.gb * 100:.0f} MB, flat, 0 MB |"
        )


def keys_of(first: int, count: int) -> np.ndarray:
    """Keys as random as digests, the same for every process."""
    return np.random.default_rng([3, first]).integers(0, 256, (count, 16), dtype=np.uint8)


def make_tiny(path: Path, samples: int, keys_only: bool = False) -> None:
    """Write segments of four fp16 numbers a sample: the first by the store, the others with its metadata."""
    store = new_store(path)
    values = np.random.default_rng(0).standard_normal((SEGMENT, TINY)).astype(np.float16)
    info = store.write_segment(keys_of(0, SEGMENT), {"state.hidden": values})
    files = {
        str(file.relative_to(path / info.id)): file.read_bytes()
        for file in (path / info.id).rglob("*")
        if file.is_file()
    }
    if keys_only:
        files = {name: data for name, data in files.items() if name.startswith(("zarr.json", "keys/"))}
    for first in range(SEGMENT, samples, SEGMENT):
        keys = keys_of(first, SEGMENT)
        raw = keys.tobytes()
        files["keys/c.0.0"] = raw + google_crc32c.value(raw).to_bytes(4, "little")
        for name, data in files.items():
            file = path / segment_id(keys) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def make_large(path: Path, gb: float) -> None:
    store = new_store(path)
    noise = np.random.default_rng(0).standard_normal((SEGMENT, *SHAPE), np.float32).astype(np.float16)
    for number in range(max(1, round(gb * 1e9 / noise.nbytes))):
        store.write_segment(keys_of(number, SEGMENT), {"state.hidden": noise})


def first_batch(path: Path) -> tuple[float, int]:
    """Return the seconds and the bytes it takes to open a store, and to give a batch of random samples."""
    before, start = status("VmRSS"), time.perf_counter()
    store = Store.open(path)
    keys = store.keys()
    order = batches(np.arange(len(keys)), BATCH, seed=0, epoch=0, shuffle=True)
    batch = next(iter(Loader(StoredRows(store.rows(keys), Reader(store.path)), {"label": np.arange(len(keys))}, order)))
    seconds = time.perf_counter() - start
    assert batch.state["hidden"].shape == (BATCH, TINY)
    return seconds, status("VmHWM") - before


def plan_all(path: Path, count: int) -> tuple[float, int]:
    """Return the seconds and the bytes it takes to plan an encode of which everything is stored; the keys count too."""
    before = status("VmRSS")
    keys = np.empty((count, 16), np.uint8)
    for first in range(0, count, SEGMENT):
        keys[first : first + SEGMENT] = keys_of(first, SEGMENT)[: count - first]
    rows = np.random.default_rng(0).permutation(count)
    start = time.perf_counter()
    assert plan(keys, [rows], [[Store.open(path)]], SEGMENT) == []
    return time.perf_counter() - start, status("VmHWM") - before


def epochs(path: Path) -> tuple[int, int, int]:
    """Return the most anonymous memory of an epoch, beyond imports, how far a second one exceeds it, and the maps'."""
    keep_freed_memory()  # as `recycle` does
    before = status("RssAnon")
    store = Store.open(path)
    keys = store.keys()
    loader = Loader(
        StoredRows(store.rows(keys), Reader(store.path)), {"label": np.arange(len(keys))}, partial(order_of, len(keys))
    )
    most = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        most.append(max(status("RssAnon") for _ in loader))
    return most[0] - before, most[1] - most[0], anonymous_in(path)


def order_of(samples: int, epoch: int) -> list[np.ndarray]:
    return batches(np.arange(samples), BATCH, seed=0, epoch=epoch, shuffle=True)


def anonymous_in(path: Path) -> int:
    """Return the bytes of files under `path` that this process has mapped and holds copies of."""
    within, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Anonymous:"):
            total += int(line.split()[1]) * 1024 * within
        elif not line.split(" ", 1)[0].endswith(":"):
            within = str(path) in line
    return total


if __name__ == "__main__":
    main()
