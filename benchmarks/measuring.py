"""Stores, processes, times and a report for several benchmarks. Importing this changes nothing in the process."""

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from pipeline.device import has_streams
from pipeline.keys import Recipe
from pipeline.store import FORMAT, Store

P = ParamSpec("P")
T = TypeVar("T")

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "accelerate",
    "peft",
    "numpy",
    "pyarrow",
    "zarr",
    "numcodecs",
)


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


def median_seconds(sides: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Run all sides in turn; return the median seconds of each until `device` is done, after a round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def busy_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Return for how long kernels run on `device` during `run`, copies aside; None where torch cannot tell."""
    known = {activity.name.lower(): activity for activity in torch.profiler.supported_activities()}  # type: ignore[no-untyped-call]
    if device.type == "cpu" or device.type not in known:
        return None
    with torch.profiler.profile(activities=[known[device.type]], acc_events=True) as profile:
        run()
        torch.accelerator.synchronize(device)
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name != "CPU" and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return covered(kernels) / 1e6 if kernels else None


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans: kernels of several streams run at once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Report:
    """The JSON file, written again after every measurement: a run that is cut short leaves what it has measured."""

    def __init__(self, path: Path, device: torch.device, limit: float) -> None:
        self.path, self.device, self.limit, self.began = path, device, limit, time.perf_counter()
        module = torch.get_device_module(device)
        name = getattr(module, "get_device_name", lambda: device.type)()
        self.content: dict[str, Any] = {
            "device": {"type": device.type, "name": name, "memory_bytes": module.mem_get_info()[1]},
            "streams": has_streams(device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
            | {library: metadata.version(library) for library in LIBRARIES},
        }
        self.complete = True

    def add(self, section: str, name: str, measure: Callable[[], Any]) -> Any:
        """Measure, write and print one row; what fails, or comes after the time limit, is a row that says so."""
        row = {"skipped": f"after {self.limit:.0f} s"}
        if time.perf_counter() - self.began < self.limit:
            try:
                row = measure()
            except Exception as error:  # the other rows are measured all the same
                row = {"error": f"{type(error).__name__}: {error}"}
        self.complete &= not {"error", "skipped"} & row.keys()
        self.content.setdefault(section, {})[name] = row
        self.content["seconds"] = round(time.perf_counter() - self.began, 1)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(f"{section}: {name}: {json.dumps(row)}", flush=True)
        return row
