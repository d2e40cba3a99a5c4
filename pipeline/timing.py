"""What frozen layers cost where nothing is kept: the prefix, timed alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

REPEATS = 5


def seconds_per_sample(prefix: Callable[..., object], batch: Mapping[str, Tensor]) -> float:
    """Return the median forward time of `prefix` on `batch` over its samples, after a warm-up."""
    count = max(len(tensor) for tensor in batch.values())
    device = next(iter(batch.values())).device
    times = []
    for _ in range(REPEATS + 1):
        _synchronise(device)
        start = time.perf_counter()
        prefix(**batch)
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / count


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
