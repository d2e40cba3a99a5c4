"""One flipped bit, or a file cut short: `verify` finds it, and what is read is refused or still right.

Right all the same are

- bytes that a reader has no use for: the checksums of raw chunks, which say again what the samples' own checksums say.
  `verify` finds them;
- a flip that leaves the JSON equal, as 1e-05 and 1E-05 are. Nothing is wrong then, and `verify` may be content.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import StoreError
from pipeline.keys import Recipe
from pipeline.store import FORMAT, Reader, Store, verify

pytestmark = pytest.mark.slow

FEW, MANY = 300, 3_000
"""Flips tried of a store, in `make test` and of the larger one in `make faults`."""


class Kept:
    """A store with what it must give, and its files."""

    def __init__(self, path: Path, storage: str, samples: int, width: int, units: int = 1) -> None:
        preprocessing = {"image_size": 224, "epsilon": 1e-05}
        self.recipe = Recipe(FORMAT, "0" * 32, "1" * 32, "layer3", preprocessing, None, "float32", storage)
        self.store = Store.create(path, self.recipe)
        rng = np.random.default_rng(3)
        for _ in range(units):
            keys = rng.integers(0, 256, (samples + 1, 16), dtype=np.uint8)
            lengths = 1 + np.arange(samples) % 3
            tensors = {
                "state.x": rng.normal(size=(samples, width)),
                "state.t": [rng.normal(size=(2, n)) for n in lengths],
                "input.i": [np.arange(n) for n in lengths],
            }
            self.store.write_segment(keys[:-1], tensors, keys[-1:])
        self.keys = self.store.keys()
        self.tensors = self.read()
        self.bad = self.store.set_aside()
        self.files = [file for file in sorted(path.rglob("*")) if file.is_file()]

    def read(self) -> dict[str, torch.Tensor]:
        store = Store.open(self.store.path, self.recipe)
        return Reader(store.path, check=True).gather(store.rows(self.keys))

    def judge(self, where: str) -> str:
        """Return who found the fault; fail if nobody did and something is wrong."""
        found = bool(verify(self.store))
        try:
            tensors = self.read()
        except StoreError:
            assert found, f"{where}: only the reader finds it"
            return "both"
        assert tensors.keys() == self.tensors.keys(), where
        for name, expected in self.tensors.items():
            assert torch.equal(tensors[name], expected), f"{where}: wrong numbers in {name}"
        return "verify" if found else "nobody"


SMALL = {"raw": "raw:float16", "zstd": "zstd:float16", "int8": "int8:float32"}


@pytest.fixture(params=SMALL)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    return Kept(tmp_path / "store", SMALL[request.param], samples=2, width=3)


def flipped(file: Path, bits: list[int]) -> Iterator[tuple[int, str]]:
    """Flip one bit after the other, and back."""
    data = file.read_bytes()
    with file.open("r+b", buffering=0) as raw:
        for bit in bits:
            raw.seek(bit // 8)
            raw.write(bytes([data[bit // 8] ^ 1 << bit % 8]))
            yield bit, f"{file.parent.name}/{file.name}, bit {bit}"
            raw.seek(bit // 8)
            raw.write(data[bit // 8 : bit // 8 + 1])


def test_any_single_bit(kept: Kept, long: bool) -> None:
    draw = random.Random(0)
    total = 8 * sum(file.stat().st_size for file in kept.files)
    seen = {"both": 0, "verify": 0, "nobody": 0}
    for file in kept.files:
        size, before = 8 * file.stat().st_size, file.read_bytes()
        bits = list(range(size)) if long else sorted(draw.sample(range(size), max(8, FEW * size // total)))
        for _, where in flipped(file, bits):
            finder = kept.judge(where)
            seen[finder] += 1
            if finder == "nobody":
                assert file.suffix == ".json", where
                assert json.loads(file.read_bytes()) == json.loads(before), where
            elif finder == "verify":
                assert file.suffix != ".json", where
    assert verify(kept.store) == []
    assert seen["both"] > 10 * (seen["verify"] + seen["nobody"])


def test_any_length(kept: Kept, long: bool) -> None:
    draw = random.Random(1)
    for file in kept.files:
        data = file.read_bytes()
        lengths = range(len(data)) if long else sorted({0, len(data) - 1, draw.randrange(len(data))})
        for length in lengths:
            file.write_bytes(data[:length])
            # The newline at the end of a text is no part of its JSON.
            finder = kept.judge(f"{file.parent.name}/{file.name}, {length} bytes")
            assert finder == "both" or (file.suffix == ".json" and data[length:].isspace())
        file.write_bytes(data)
    assert verify(kept.store) == []


def test_random_bits_of_a_larger_store(tmp_path: Path, long: bool) -> None:
    kept = Kept(tmp_path / "store", "raw:float16", samples=64, width=200, units=4)
    draw = random.Random(2)
    for _ in range(MANY if long else FEW // 10):
        file = draw.choice(kept.files)
        for _, where in flipped(file, [draw.randrange(8 * file.stat().st_size)]):
            kept.judge(where)
    assert verify(kept.store) == []


def test_without_checks_a_flip_would_be_read(tmp_path: Path) -> None:
    """The proof that the checks are what finds it."""
    kept = Kept(tmp_path / "store", "raw:float16", samples=2, width=3)
    (chunk,) = kept.store.path.glob("*/state.x/c.*")
    for _, _ in flipped(chunk, [0]):
        unchecked = Reader(kept.store.path, check=False).gather(kept.store.rows(kept.keys))
        assert not torch.equal(unchecked["state.x"], kept.tensors["state.x"])
        with pytest.raises(StoreError, match=r"other bytes in row 0"):
            kept.read()
