"""Calls before the cut that phantoms cannot go through: a choice of experts by value, a scan written into a buffer.

Such a call is seen from outside alone. What it returns is sketched from one real run: each tensor is one of its
arguments, or has the shape and dtype of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.modes import eval_run
from pipeline.split.phantom import Phantom, before_the_cut
from pipeline.split.tree import Args, Kwargs, arguments, is_plain, map_tensors


@dataclass(frozen=True)
class Sketch:
    """What a call returns: `output` with, for each leaf, the argument that it is or that it is `like`."""

    output: Any
    passed: Mapping[str, str]
    like: Mapping[str, str]

    def imagine(self, args: Args, kwargs: Kwargs) -> Any:
        """Return the output of the call with phantoms of unseen origin in it."""
        taken = arguments(args, kwargs)

        def leaf(path: str, _: Tensor) -> Tensor:
            return taken[self.passed[path]] if path in self.passed else Phantom.like(taken[self.like[path]], None)

        return map_tensors(leaf, self.output)


def sketch(model: nn.Module, path: str, args: Args, kwargs: Kwargs) -> Sketch:
    """Return the sketch of what module `path` returns, from one run of the full model.

    Raises:
        SplitError: a tensor that it returns has the shape of none of its arguments.
    """
    seen: list[tuple[Args, Kwargs, Any]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    try:
        with eval_run(model, args, kwargs):
            model(*args, **kwargs)
    finally:
        handle.remove()
    given, named, output = seen[0]
    taken = arguments(given, named)
    passed: dict[str, str] = {}
    like: dict[str, str] = {}

    def leaf(path_: str, item: Tensor) -> Tensor:
        same = [name for name, other in taken.items() if other is item]
        fits = [name for name, other in taken.items() if other.shape == item.shape and other.dtype == item.dtype]
        if same:
            passed[path_] = same[0]
        elif fits:
            like[path_] = fits[0]
        else:
            raise SplitError(
                f"module {path!r} depends on values and returns a tensor {tuple(item.shape)} that is shaped like none "
                "of its arguments; cut before it"
            )
        return torch.empty(0)

    if not is_plain(output):
        raise SplitError(f"module {path!r} depends on values and returns {type(output).__name__}; cut before it")
    return Sketch(map_tensors(leaf, output), passed, like)


class Opaque:
    """The `forward` of a module that is not run before the cut."""

    def __init__(self, forward: Callable[..., Any], outline: Sketch) -> None:
        self.forward, self.outline = forward, outline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.outline.imagine(args, kwargs) if before_the_cut() else self.forward(*args, **kwargs)


def close(root: nn.Module, sketches: Mapping[str, Sketch]) -> None:
    """Make the sketched modules of `root` opaque."""
    for path, outline in sketches.items():
        module = root.get_submodule(path)
        module.forward = Opaque(module.forward, outline)
