"""The cost of the layers before and after a cut: timed, and as the operations predict it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

REPEATS = 5
BACKWARD = 2
"""Cost of a backward pass in forward passes: one for the gradients of the inputs, one for those of the weights."""


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


def speed_ups(flops: float, flops_after: float, *, backward: int = BACKWARD) -> tuple[float | None, float | None]:
    """Return the expected speed-up of a training step over full fine-tuning, and over frozen layers run every time.

    A step is taken to be bound by computation, and backward to cost `backward` times forward. With 2 of these, `flops`
    operations before the cut and `flops_after` after it, recycling costs 3 x after, frozen layers cost
    before + 3 x after, and full fine-tuning costs 3 x (before + after). None where no operation comes after the cut.
    """
    if not flops_after:
        return None, None
    step = (1 + backward) * flops_after
    return (1 + backward) * (flops + flops_after) / step, (flops + step) / step
