"""The store against its peers: writing, random batches, a cold cache, ragged states, codecs.

    python benchmarks/store.py [write warm cold ragged codecs] [--samples 4096] [--batch 64] [--rounds 5]

Both sides of a ratio run in turn in this process, on the same bytes, with labels, as torch tensors on the CPU; shown
are medians. The cache is warm but for `cold`, which has the kernel drop the files from its page cache before a round.
Peers that are not installed (pip install -e .[bench]) are left out, and named.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import peers
import torch
from measuring import new_store
from numcodecs import blosc

from pipeline.memory import keep_freed_memory
from pipeline.store import Reader, SegmentCache, Store
from pipeline.train.loader import Loader, StoredRows
from pipeline.train.order import Window, batches

SHAPE = (256, 14, 14)
WIDTH, LONGEST = 384, 256
SEGMENT = 512
SECONDS = 1.5
"""A reader is stopped after this long in a round: the slow ones would take minutes."""

Order = Callable[[int], list[np.ndarray]]
Batches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
"""Epoch -> its batches of states and labels."""


def main() -> None:
    """Run the chosen parts."""
    parts = {"write": write, "warm": warm, "cold": cold, "ragged": ragged, "codecs": codecs}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(parts)}; all by default")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--dir", type=Path, help="where the stores are made, and removed again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `recycle` does, for both sides
    print(
        f"{options.samples} samples of {'x'.join(map(str, SHAPE))} fp16, batches of {options.batch}, {SEGMENT} samples"
    )
    print(f"a segment, {options.threads} torch threads, no worker processes, medians of {options.rounds} rounds")
    for name in options.parts or parts:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            print(f"\n## {name}\n")
            parts[name](Path(folder), options)


def write(folder: Path, options: argparse.Namespace) -> None:
    """Segments, as an encode writes them, against one plain file for each, synced."""
    states = maps(SEGMENT)
    count = max(1, options.samples // SEGMENT)
    rates: dict[str, list[float]] = {"plain file": [], "segment": []}
    for turn in range(options.rounds + 1):
        start = time.perf_counter()
        for i in range(count):
            with (folder / f"plain-{turn}-{i}").open("wb") as file:
                file.write(states.data)
                os.fsync(file.fileno())
        middle = time.perf_counter()
        store = new_store(folder / f"store-{turn}")
        for i in range(count):
            store.write_segment(some_keys(i * SEGMENT, SEGMENT), {"state.hidden": states})
        end = time.perf_counter()
        if turn:
            for name, seconds in (("plain file", middle - start), ("segment", end - middle)):
                rates[name].append(count * states.nbytes / seconds / 1e9)
    table(rates, "GB/s", "segment", {"plain file": 0.5})


def warm(folder: Path, options: argparse.Namespace) -> None:
    """Random batches from a warm cache, against every peer."""
    states, labels = maps(options.samples), np.arange(options.samples) % 100
    order = random_order(options)
    loader = a_loader(filled(folder / "store", states), labels, order)
    start = time.perf_counter()
    for _ in read(loader)(0):
        pass
    print(f"first epoch, every sample checked: {options.samples / (time.perf_counter() - start):,.0f} samples/s\n")
    readers: dict[str, Batches] = {"recycling loader": read(loader)}
    bounds = {}
    for name, (bound, make) in peers.PEERS.items():
        try:
            readers[name] = make(folder / name.split()[0].strip(",").lower(), states, labels, order, options.batch)
            bounds[name] = bound
        except ImportError as missing:
            print(f"left out: {name} ({missing})")
    check_alike(readers)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for epoch in range(1, options.rounds + 2):  # the first warms caches and allocators
        for name, batches_of in readers.items():
            rate = samples_per_second(batches_of(epoch))
            if epoch > 1:
                rates[name].append(rate)
    table(rates, "samples/s", "recycling loader", bounds)


def cold(folder: Path, options: argparse.Namespace) -> None:
    """Chunk-shuffled batches after the page cache has lost the store, against reading one file from end to end.

    Four times the samples: nothing overlaps with reading the first window.
    """
    options = argparse.Namespace(**vars(options) | {"samples": 4 * options.samples})
    states, labels = maps(options.samples), np.arange(options.samples) % 100
    store = filled(folder / "store", states)
    plain = folder / "plain"
    states.tofile(plain)
    places = store.rows(some_keys(0, options.samples))

    def order(epoch: int) -> list[np.ndarray]:
        window = Window(places.segment, 2)
        rows = np.arange(options.samples)
        return batches(rows, options.batch, seed=0, epoch=epoch, shuffle=True, window=window)

    files = [path for path in store.path.rglob("c.*") if path.is_file()]
    rates: dict[str, list[float]] = {"file, end to end": [], "checked": [], "recycling loader": []}
    for turn in range(options.rounds):
        forget([plain])
        buffer, start = bytearray(8 << 20), time.perf_counter()
        with plain.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        rates["file, end to end"].append(states.nbytes / (time.perf_counter() - start) / 1e9)
        for name, check in (("checked", True), ("recycling loader", False)):
            source = loader = None  # pages that are mapped are not dropped
            gc.collect()
            forget(files)
            source = Reader(store.path, check=check)
            samples = StoredRows(store.rows(store_keys(options)), source)
            loader = Loader(samples, {"label": labels}, order, read_ahead=4 * SEGMENT * states[0].nbytes)
            start = time.perf_counter()
            for _ in read(loader)(turn):
                pass
            rates[name].append(states.nbytes / (time.perf_counter() - start) / 1e9)
    table(rates, "GB/s", "recycling loader", {"file, end to end": 0.8})


def ragged(folder: Path, options: argparse.Namespace) -> None:
    """Token states of different lengths, batches of similar length, against states of one shape and as many bytes."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, LONGEST + 1, options.samples)
    flat = rng.standard_normal((int(lengths.sum()), WIDTH), np.float32).astype(np.float16)
    tokens = np.split(flat, np.cumsum(lengths)[:-1])
    mean = int(lengths.mean())
    fixed = flat[: options.samples * mean].reshape(options.samples, mean, WIDTH)
    labels = np.arange(options.samples) % 100
    stores = {"one shape": filled(folder / "fixed", fixed), "ragged": filled(folder / "ragged", tokens)}
    sizes = Reader(stores["ragged"].path).sizes(stores["ragged"].rows(store_keys(options)))
    own = {"one shape": fixed.nbytes / options.samples, "ragged": sizes.mean()}

    def order(epoch: int) -> list[np.ndarray]:
        drawn = batches(np.arange(options.samples), options.batch, seed=0, epoch=epoch, shuffle=True, lengths=sizes)
        return [rows for rows in drawn if len(rows) == options.batch]

    for name, some in (("random", random_order(options)(0)), ("of similar length", order(0))):
        padded = sum(len(rows) * sizes[rows].max() for rows in some)
        print(f"padding in batches {name}: {1 - sum(sizes[rows].sum() for rows in some) / padded:.1%}")
    print()
    orders = {"one shape": random_order(options), "ragged": order}
    loaders = {name: a_loader(store, labels, orders[name]) for name, store in stores.items()}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(options.rounds + 1):
        for name, loader in loaders.items():
            rate = samples_per_second(read(loader)(epoch)) * own[name] / 1e9
            if epoch:
                rates[name].append(rate)
    table(rates, "GB/s", "ragged", {"one shape": 0.7})


def codecs(folder: Path, options: argparse.Namespace) -> None:
    """Sizes and rates of each codec, and unpacking against the decoder alone on all cores."""
    states = np.maximum(maps(options.samples), 0)  # as after a ReLU
    labels = np.arange(options.samples) % 100
    rates, loaders = {}, {}
    print("| codec | bytes a sample | first epoch, samples/s |\n|---|---|---|")
    for codec in ("raw", "zstd", "int8", "int8-channel"):
        store = filled(folder / codec, states, f"{codec}:float16")
        source = Reader(store.path, cache=SegmentCache(folder / "scratch"))
        loaders[codec] = a_loader(store, labels, random_order(options), source)
        start = time.perf_counter()
        for _ in read(loaders[codec])(0):
            pass
        first = options.samples / (time.perf_counter() - start)
        print(f"| {codec} | {store.nbytes() / options.samples:,.0f} | {first:,.0f} |")
        rates[codec] = [samples_per_second(read(loaders[codec])(epoch)) for epoch in range(1, options.rounds + 1)]
    print()
    table(rates, "samples/s", "raw", {})
    store = Store.open(folder / "zstd")
    packed = [path.read_bytes()[:-4] for path in store.path.rglob("state.hidden/c.*")]
    unpacking: dict[str, list[float]] = {"decoder, all cores": [], "unpacking to scratch": []}
    blosc.set_nthreads(os.cpu_count() or 1)
    for turn in range(options.rounds):
        start = time.perf_counter()
        for chunk in packed:
            blosc.decompress(chunk)
        middle = time.perf_counter()
        reader = Reader(store.path, cache=SegmentCache(folder / f"scratch-{turn}"))
        for segment in store.segments():
            reader.segment(segment)
        end = time.perf_counter()
        unpacking["decoder, all cores"].append(states.nbytes / (middle - start) / 1e9)
        unpacking["unpacking to scratch"].append(states.nbytes / (end - middle) / 1e9)
    print()
    table(unpacking, "GB/s", "unpacking to scratch", {})


def maps(samples: int) -> np.ndarray:
    """Return feature maps, (samples, *SHAPE) fp16."""
    states = np.empty((samples, *SHAPE), np.float16)
    for begin in range(0, samples, SEGMENT):
        part = states[begin : begin + SEGMENT]
        part[...] = np.random.default_rng(begin).standard_normal(part.shape, np.float32)
    return states


def some_keys(begin: int, count: int) -> np.ndarray:
    """Return the keys (count, 16) of samples from number `begin` on."""
    numbers = np.arange(begin, begin + count, dtype=np.uint64)
    keys = np.zeros((count, 16), np.uint8)
    keys[:, :8] = (numbers * np.uint64(0x9E3779B97F4A7C15))[:, None].view(np.uint8)
    return keys


def store_keys(options: argparse.Namespace) -> np.ndarray:
    return some_keys(0, options.samples)


def filled(path: Path, states: np.ndarray | list[np.ndarray], storage: str = "raw:float16") -> Store:
    store = new_store(path, storage)
    for begin in range(0, len(states), SEGMENT):
        part = states[begin : begin + SEGMENT]
        store.write_segment(some_keys(begin, len(part)), {"state.hidden": part})
    return store


def random_order(options: argparse.Namespace) -> Order:
    def order(epoch: int) -> list[np.ndarray]:
        drawn = batches(np.arange(options.samples), options.batch, seed=0, epoch=epoch, shuffle=True)
        return [rows for rows in drawn if len(rows) == options.batch]

    return order


def a_loader(store: Store, labels: np.ndarray, order: Order, source: Reader | None = None) -> Loader:
    samples = StoredRows(store.rows(some_keys(0, len(labels))), source or Reader(store.path))
    return Loader(samples, {"label": labels}, order)


def read(loader: Loader) -> Batches:
    def epoch_of(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader.set_epoch(epoch)
        for batch in loader:
            yield batch.state["hidden"], batch.targets["label"]

    return epoch_of


def samples_per_second(batches_: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    start, count = time.perf_counter(), 0
    for _, labels in batches_:
        count += len(labels)
        if time.perf_counter() - start > SECONDS:
            break
    return count / (time.perf_counter() - start)


def check_alike(readers: dict[str, Batches]) -> None:
    """A race between readers of different data would mean nothing: compare one batch, sample by sample.

    Streaming peers choose their own order; of theirs, each sample must be one of the data set, told by its sum.
    """
    sums: dict[str, set[float]] = {}
    known: set[float] = set()
    for name, batches_of in readers.items():
        states, _ = next(iter(batches_of(0)))
        sums[name] = {round(float(state.double().sum()), 3) for state in states}
    for name in readers:
        if name in peers.STREAMS:
            known = known or {round(float(s.double().sum()), 3) for b, _ in readers["recycling loader"](0) for s in b}
            if not sums[name] <= known:
                raise SystemExit(f"{name} gives samples that nobody wrote")
        elif sums[name] != sums["recycling loader"]:
            raise SystemExit(f"{name} gives other samples than the recycling loader")


def forget(files: list[Path]) -> None:
    """Have the kernel drop files from its page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def table(rates: dict[str, list[float]], unit: str, ours: str, bounds: dict[str, float]) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"| | {unit} | range | {ours} is | asked |\n|---|---|---|---|---|")
    for name, rate in medians.items():
        digits = ",.0f" if rate > 100 else ".2f"
        ratio = "" if name == ours else f"{medians[ours] / rate:.2f}x"
        asked = f">= {bounds[name]}x" if name in bounds else ""
        spread = f"{format(min(rates[name]), digits)}-{format(max(rates[name]), digits)}"
        print(f"| {name} | {format(rate, digits)} | {spread} | {ratio} | {asked} |")


if __name__ == "__main__":
    main()
