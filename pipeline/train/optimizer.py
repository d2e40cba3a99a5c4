"""The optimizer of a run, any of `torch.optim` by name, its groups of parameters and its learning-rate schedule."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pipeline.errors import ConfigError, TrainError
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer_kinds import fused_options, has_weight_decay


def open_optimizer(model: nn.Module, config: TrainConfig, fresh: frozenset[str]) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, for the parameters of `model` that train.

    Raises:
        ConfigError: it does not take these parameters.
        TrainError: no parameter trains.
    """
    groups = parameter_groups(model, config, fresh)
    parameters = [item for group in groups for item in group["params"]]
    options = fused_options(config.optimizer, config.optimizer_options, parameters)
    try:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, config.optimizer)(groups, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train.optimizer is {config.optimizer}, which does not take the parameters after this cut: {error}"
        ) from error
    return optimizer


def parameter_groups(model: nn.Module, config: TrainConfig, fresh: frozenset[str]) -> list[dict[str, Any]]:
    """Return the optimizer's groups: pretrained and fresh parameters, each with and without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fresh = name.removeprefix("suffix.") in fresh or name.startswith("loss.")
            groups.setdefault((is_fresh, parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise TrainError(
            "nothing trains after this cut: no parameter is left; choose a cut below 1.0 or a head with parameters"
        )
    takes_decay = has_weight_decay(config.optimizer)
    return [
        {
            "params": parameters,
            "lr": (config.head_lr or config.lr) if is_fresh else config.lr,
            **({"weight_decay": config.weight_decay if decays else 0.0} if takes_decay else {}),
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
