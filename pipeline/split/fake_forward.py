"""Calls before the cut that cannot run on phantoms: a choice of experts by value, a scan that writes into a buffer.

The module of such a call gets a fake `forward`, which runs nothing and returns phantoms. Their shapes follow from one
real run: each tensor of the output is one of the arguments, or has the shape and dtype of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.modes import eval_run
from pipeline.split.phantom import THREAD, Phantom
from pipeline.split.trace import observed_calls
from pipeline.split.tree import Args, Kwargs, arguments, is_plain, map_tensors


@dataclass(frozen=True)
class FakeForward:
    """The `forward` of a module that does not run before the cut; after the cut it is the module's own.

    Attributes:
        output: what the call returns, with placeholders for tensors.
        passed: leaf of the output -> the argument that is returned there.
        like: leaf of the output -> the argument whose shape and dtype the tensor there has.
        forward: the module's own.
    """

    output: Any
    passed: Mapping[str, str]
    like: Mapping[str, str]
    forward: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward is not None and THREAD.interpreter.entered:
            return self.forward(*args, **kwargs)
        taken = arguments(args, kwargs)

        def leaf(path: str, _: Tensor) -> Tensor:
            return taken[self.passed[path]] if path in self.passed else Phantom.like(taken[self.like[path]], None)

        return map_tensors(leaf, self.output)


def observe_forward(model: nn.Module, path: str, args: Args, kwargs: Kwargs) -> FakeForward:
    """Return a fake `forward` for module `path` from one run of the full model, or raise SplitError."""
    calls: list[tuple[Args, Kwargs, Any]] = []
    on_return = lambda path, index, args, kwargs, output: calls.append((args, kwargs, output))  # noqa: E731
    with observed_calls(model, on_return=on_return, paths={path}), eval_run(model, args, kwargs):
        model(*args, **kwargs)
    given, named, output = calls[0]
    if not is_plain(output):
        raise SplitError(f"module {path!r} depends on values and returns {type(output).__name__}; cut before it")
    taken = arguments(given, named)
    passed: dict[str, str] = {}
    like: dict[str, str] = {}

    def leaf(at: str, item: Tensor) -> Tensor:
        same = [name for name, other in taken.items() if other is item]
        fits = [name for name, other in taken.items() if other.shape == item.shape and other.dtype == item.dtype]
        if not same and not fits:
            raise SplitError(
                f"module {path!r} depends on values and returns a tensor {tuple(item.shape)} that is shaped like none "
                "of its arguments; cut before it"
            )
        (passed if same else like)[at] = (same or fits)[0]
        return torch.empty(0)

    return FakeForward(map_tensors(leaf, output), passed, like)


def install_fake_forwards(root: nn.Module, fakes: Mapping[str, FakeForward]) -> None:
    """Give the modules of `root` that are named in `fakes` these `forward`s."""
    for path, fake in fakes.items():
        module = root.get_submodule(path)
        module.forward = replace(fake, forward=module.forward)
