"""Stores small enough to look at."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.keys import Recipe
from pipeline.store import FORMAT, Store


@pytest.fixture
def recipe():
    return Recipe(
        format=FORMAT,
        weights="0" * 32,
        architecture="1" * 32,
        cut="layer3",
        preprocessing={"image_size": 224},
        view=None,
        compute_dtype="float32",
        storage="raw:float16",
    )


@pytest.fixture
def store(tmp_path, recipe):
    return Store.create(tmp_path / "store", recipe)


@pytest.fixture
def make_keys():
    def make(n, seed=0):
        return np.random.default_rng([7, seed]).integers(0, 256, (n, 16), dtype=np.uint8)

    return make


@pytest.fixture
def fingerprint():
    """Every path under a folder with the digest of its bytes."""

    def read(root: Path):
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(root.rglob("*"))
        }

    return read
