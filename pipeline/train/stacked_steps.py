"""The arithmetic of several runs at once: one optimizer for all, and one product for their linear layers.

K runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.train.config import DEFAULT_OPTIMIZER, TrainConfig
from pipeline.train.objective import Objective
from pipeline.train.optimizer import parameter_groups, schedule

FREE = ("lr", "head_lr", "weight_decay", "seed")
"""Settings of `train` in which runs may differ that are trained at once."""
OPTIMIZERS = (DEFAULT_OPTIMIZER, "SGD")
"""Those that work element by element, with steps proportional to the learning rate."""


class StackedOptimizer:
    """The optimizer of K runs: torch's own at a rate of 1 finds their steps, taken at each run's rate and decay."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        objective: Objective,
        configs: Sequence[TrainConfig],
        fresh: frozenset[str],
        steps: int,
    ) -> None:
        """Update those of `tensors` (K, ...) that train in `objective`, by a schedule over so many `steps`."""
        config, self._tensors = configs[0], tensors
        groups = [parameter_groups(objective, own, fresh) for own in configs]
        by_run = [{id(item): group for group in own for item in group["params"]} for own in groups]
        self._rates, self._decays = dict[str, Tensor](), dict[str, Tensor]()
        for name, item in objective.suffix.named_parameters():
            if item.requires_grad:
                shape = (-1, *(1 for _ in item.shape))
                for key, values in (("lr", self._rates), ("weight_decay", self._decays)):
                    values[name] = tensors[name].new_tensor([own[id(item)][key] for own in by_run]).reshape(shape)
        self._steps = {name: nn.Parameter(torch.zeros_like(tensors[name])) for name in self._rates}
        self._gradients = {name: torch.zeros_like(step) for name, step in self._steps.items()}
        for name, step in self._steps.items():
            step.grad = self._gradients[name]
        kind = getattr(torch.optim, config.optimizer)
        self._torch = kind(self._steps.values(), lr=1.0, weight_decay=0.0, **config.optimizer_options)
        self._schedule = schedule(self._torch, config, steps)
        self._is_decoupled, self._limit = config.optimizer == DEFAULT_OPTIMIZER, config.max_grad_norm

    def leaves(self, places: slice, size: int) -> dict[str, Tensor]:
        """Return the tensors of the runs at `places` by name, (S, `size`, ...), whose gradients `step` takes."""
        found = {name: by_seed(self._tensors[name][places], size).detach() for name in self._steps}
        for name, leaf in found.items():
            leaf.requires_grad_().grad = by_seed(self._gradients[name][places], size)
        return found

    def leave_out(self, names: Iterable[str]) -> None:
        """Never update the tensors `names`."""
        for name in names:
            del self._rates[name]

    @torch.no_grad()
    def step(self) -> None:
        """Update the tensors of all runs by their gradients, and set these to zero."""
        if self._limit is not None:
            _clip(self._gradients.values(), self._limit)
        factor = self._torch.param_groups[0]["lr"]
        if not self._is_decoupled:
            for name in self._rates:
                self._gradients[name].addcmul_(self._tensors[name], self._decays[name])
        self._torch.step()
        for name, rate in self._rates.items():
            if self._is_decoupled:
                self._tensors[name].mul_(1 - factor * rate * self._decays[name])
            self._tensors[name].addcmul_(self._steps[name], rate)
        torch._foreach_zero_([*self._steps.values(), *self._gradients.values()])
        self._schedule.step()


def by_seed(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor of S * `size` runs, (S * size, ...), as a view (S, size, ...)."""
    return tensor.view(-1, size, *tensor.shape[1:])


def _clip(gradients: Iterable[Tensor], limit: float) -> None:
    """Scale the gradients of each run, (K, ...) per tensor, to the norm `limit` where theirs is larger."""
    norms_K = torch.stack([item.flatten(1).norm(dim=1) for item in gradients]).norm(dim=0)
    scales_K = (limit / (norms_K + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for item in gradients:
        item.mul_(scales_K.reshape(-1, *(1 for _ in item.shape[1:])))


class OneProduct(TorchFunctionMode):
    """Compute linear layers as weight times input, of which vmap makes faster products than of input times weight."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        compute = _linear if func is F.linear else func
        return compute(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    output = (weight @ rows.mT).mT.contiguous().reshape(*input.shape[:-1], len(weight))
    return output if bias is None else output + bias
