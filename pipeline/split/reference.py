"""The full model in training, as the suffix must reproduce it: in eval mode until the cut, in train mode from it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.split.cut import Cut
from pipeline.split.modes import errors_as_refusals, random_state_kept
from pipeline.split.splittable import copy_of
from pipeline.split.tree import Args, Kwargs, map_tensors


def run_in_training(model: nn.Module, cut: Cut, args: Args, kwargs: Kwargs) -> tuple[Any, dict[str, Tensor]]:
    """Run a copy of `model`, with random numbers as `seed_calls` has them; return its output and its buffers after it.

    Raises:
        InputRefusedError: the model's own code fails in train mode.
    """
    root = copy_of(model, {id(item): item for item in model.parameters()}).train()
    flags = [(module, module.training) for module in root.modules()]
    with_gradients = torch.is_grad_enabled()
    calls_to_come = iter(range(cut.call, -1, -1))

    def enter(*_: Any) -> None:
        if next(calls_to_come, None) == 0:
            torch.set_grad_enabled(with_gradients)
            for module, training in flags:
                module.training = training

    for module in root.modules():
        module.training = False
    seed_calls(root.get_submodule(cut.path))
    root.get_submodule(cut.path).register_forward_pre_hook(enter)
    with random_state_kept(root), torch.no_grad(), errors_as_refusals(model, args, kwargs, "train"):
        output = root(*args, **kwargs)
    return map_tensors(lambda _, item: item.detach(), output), dict(root.named_buffers())


def seed_calls(module: nn.Module) -> Any:
    """Set the random seed at every call of `module`, until the returned handle is removed.

    At the cut module, this makes what is drawn after the cut independent of what runs before it.
    """

    def seed(*_: Any) -> None:
        torch.manual_seed(0)

    return module.register_forward_pre_hook(seed)
