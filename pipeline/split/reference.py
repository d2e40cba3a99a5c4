"""The full model in training, as the suffix must reproduce it: in eval mode until the cut, in train mode from it on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.split.cut import Cut
from pipeline.split.modes import errors_as_refusals, random_state_kept
from pipeline.split.splittable import copy_of
from pipeline.split.trace import observed_calls
from pipeline.split.tree import Args, Kwargs, map_tensors


def run_in_training(model: nn.Module, cut: Cut, args: Args, kwargs: Kwargs) -> tuple[Any, dict[str, Tensor]]:
    """Run a copy of `model`, with random numbers as in `seeded_calls`; return its output and its buffers after it."""
    root = copy_of(model, {id(item): item for item in model.parameters()}).train()
    flags = [(module, module.training) for module in root.modules()]
    with_gradients = torch.is_grad_enabled()

    def on_call(path: str, index: int, args: Args, kwargs: Kwargs) -> None:
        if index == cut.call:
            torch.set_grad_enabled(with_gradients)
            for module, training in flags:
                module.training = training

    for module in root.modules():
        module.training = False
    with (
        random_state_kept(root),
        torch.no_grad(),
        errors_as_refusals(model, args, kwargs, "train"),
        observed_calls(root, on_call, paths={cut.path}),
        seeded_calls(root, cut),
    ):
        output = root(*args, **kwargs)
    return map_tensors(lambda _, item: item.detach(), output), dict(root.named_buffers())


def seeded_calls(root: nn.Module, cut: Cut) -> AbstractContextManager[None]:
    """Set the random seed at every call of the cut module: what is drawn later does not depend on what runs before."""

    def on_call(*_: Any) -> None:
        torch.manual_seed(0)

    return observed_calls(root, on_call, paths={cut.path})
