"""Stores and processes that several benchmarks measure. Importing this changes nothing in the process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from pipeline.keys import Recipe
from pipeline.store import FORMAT, Store


def new_store(path: Path, storage: str = "raw:float16") -> Store:
    """Make a store of no network at all."""
    return Store.create(path, Recipe(FORMAT, "", "", "", {}, None, "float32", storage))


def apart(function, *arguments):
    """Call a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def status(field: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")
