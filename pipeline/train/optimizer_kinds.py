"""The optimizers of torch.optim by name: which there are, and what they take."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FUSED, FUSED_ON = frozenset({"Adam", "AdamW", "SGD"}), frozenset({"cpu", "cuda", "xpu", "mps"})
"""Optimizers, and types of devices, that torch has fused steps for."""
EXCLUDED = frozenset({"foreach", "differentiable", "capturable", "maximize"})
"""Options that choose another way, or that not every fused step takes."""


def has_weight_decay(optimizer: str) -> bool:
    """Return whether a class of torch.optim takes a weight decay."""
    return "weight_decay" in inspect.signature(getattr(torch.optim, optimizer)).parameters


def fused_options(optimizer: str, options: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return `options`, and the one that has a step computed in one pass over the parameters, where torch can.

    On a CPU the usual step makes several passes, and a tensor as large as the largest parameter in each: it takes eight
    times as long for 48 million parameters, with the same result within rounding.
    """
    fits = optimizer in FUSED and all(item.is_floating_point() and item.device.type in FUSED_ON for item in parameters)
    return {"fused": True, **options} if fits and not EXCLUDED & options.keys() else dict(options)


def fault_of(name: str, options: dict[str, Any]) -> str | None:
    """Return why no optimizer can be made so; found by a step of one on two small parameters."""
    if not _is_optimizer(getattr(torch.optim, name, None)):
        known = ", ".join(sorted(other for other, kind in vars(torch.optim).items() if _is_optimizer(kind)))
        return f"optimizer is {name!r}; torch.optim has {known}"
    kind = getattr(torch.optim, name)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((1, 1), (1,))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        kind(parameters, lr=1e-3, **options).step()
    except (TypeError, ValueError, RuntimeError) as error:
        takes = ", ".join(name for name in inspect.signature(kind).parameters if name not in ("params", "lr"))
        return f"optimizer is {name} with optimizer_options {options}: {error}; {name} takes {takes}"
    return None


def _is_optimizer(kind: object) -> bool:
    """Return whether `kind` is an optimizer that only needs gradients: not LBFGS, whose step takes a function."""
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        return False
    step = inspect.signature(kind.step).parameters.get("closure")
    return "lr" in inspect.signature(kind).parameters and (step is None or step.default is None)
