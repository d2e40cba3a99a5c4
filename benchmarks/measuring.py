"""Stores and processes that several benchmarks measure. Importing this changes nothing in the process."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipeline.keys import Recipe
from pipeline.store import FORMAT, Store

P = ParamSpec("P")
T = TypeVar("T")


def new_store(path: Path, storage: str = "raw:float16") -> Store:
    """Make a store of no network at all."""
    return Store.create(path, Recipe(FORMAT, "", "", "", {}, None, "float32", storage))


def apart(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a process of its own, whose memory holds what its modules import and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.store", "pipeline.train.loader"])  # imported once, not for each call
    with context.Pool(1) as pool:
        return pool.apply(function, arguments, options)


def status(field: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")
