"""One watched forward pass of a model: its module calls in order, and the weights it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.split.modes import eval_mode
from pipeline.split.reads import Reads
from pipeline.split.tree import Args, Kwargs


@dataclass
class Call:
    """One call of a module: number `index` of module `path`, from tick `start` to tick `end` of the forward pass."""

    path: str
    index: int
    start: int
    end: int = -1


@dataclass(frozen=True)
class Trace:
    """The module calls of a forward pass in order of entry, and the names of the weights it read."""

    calls: list[Call]
    reads: set[str]
    output: Any


def trace(model: nn.Module, args: Args, kwargs: Kwargs) -> Trace:
    """Run `model` once in eval mode, without gradients, and return what was seen."""
    watch = _Watch()
    handles = []
    for path, module in model.named_modules():
        handles += [module.register_forward_pre_hook(watch.enter(path)), module.register_forward_hook(watch.leave)]
    try:
        with torch.no_grad(), eval_mode(model), Reads(model) as reads:
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(watch.calls, reads.names, output)


class _Watch:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._open: list[Call] = []
        self._counts: dict[str, int] = {}
        self._ticks = iter(range(1 << 62))

    def enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            call = Call(path, self._counts.get(path, 0), next(self._ticks))
            self._counts[path] = call.index + 1
            self.calls.append(call)
            self._open.append(call)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop().end = next(self._ticks)
