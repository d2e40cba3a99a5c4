"""Parameter groups of the optimizer, and the schedule of their learning rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pipeline.errors import TrainError
from pipeline.train.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig, fresh: frozenset[str]) -> list[dict[str, Any]]:
    """Return AdamW's groups: pretrained and fresh parameters, each with and without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fresh = name.removeprefix("suffix.") in fresh or name.startswith("loss.")
            groups.setdefault((is_fresh, parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise TrainError(
            "nothing trains after this cut: no parameter is left; choose a cut below 1.0 or a head with parameters"
        )
    return [
        {
            "params": parameters,
            "lr": (config.head_lr or config.lr) if is_fresh else config.lr,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_fresh, decays), parameters in groups.items()
    ]


def schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """Return the learning-rate schedule over `steps` steps."""
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after: LRScheduler
    if config.schedule == "cosine":
        after = CosineAnnealingLR(optimizer, rest)
    elif config.schedule == "linear":
        after = LinearLR(optimizer, 1.0, 0.0, rest)
    else:
        after = ConstantLR(optimizer, 1.0)
    if not warmup:
        return after
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup), after], milestones=[warmup])
