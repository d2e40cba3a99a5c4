"""Train and eval flags and random state, set and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in eval mode, and give each its own flag back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leave the random state of the CPU and of the devices of `model` as it was."""
    devices = {item.device.index for item in model.parameters() if item.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
