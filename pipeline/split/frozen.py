"""The weights that a suffix reads nothing of, or reads without training them.

A parameter read before the cut leaves its module's `_parameters`, so that `parameters()`, `state_dict()`, `.to()`, DDP
and optimizers see only what trains. At rest a plain attribute stands in its place: the real tensor where the suffix
reads its values (a tied embedding), else a stand-in of one element, expanded: NaN, so that a forgotten read shows.
While a replay runs phantoms stand in both places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.split.phantom import Phantom
from pipeline.split.sources import Weight
from pipeline.split.tree import Args, Kwargs, map_arguments

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dummy(like: Tensor, *, dense: bool = False) -> Tensor:
    """Return a tensor of the shape, dtype and device of `like`: NaN, or zero for other than floating point.

    It has one element of storage; `dense` gives it memory of its own, so that it can be written to.
    """
    fill = float("nan") if like.dtype.is_floating_point or like.dtype.is_complex else 0
    return torch.full(like.shape if dense else (), fill, dtype=like.dtype, device=like.device).expand(like.shape)


class Frozen:
    """The frozen parameters of one suffix's module tree.

    Attributes:
        kept: real values by canonical name, of the parameters that the suffix reads.
    """

    def __init__(self, root: nn.Module, names: Mapping[str, str], kept: Mapping[str, Tensor]) -> None:
        """`names`: every frozen name in `root` -> the canonical one among those that are tied together."""
        modules = dict(root.named_modules(remove_duplicate=False))
        self.kept = dict(kept)
        self._places: list[tuple[nn.Module, str, str]] = []
        self._resting: dict[str, Tensor] = {}
        for name, canonical in names.items():
            path, _, attribute = name.rpartition(".")
            parameter = modules[path]._parameters.pop(attribute, None)
            if parameter is None:  # the same module under a second path
                continue
            self._places.append((modules[path], attribute, canonical))
            resting = kept[canonical] if canonical in kept else dummy(parameter)
            self._resting.setdefault(canonical, resting)
        self._haunt: dict[str, Phantom] = {}
        self._moved = {dtype: dtype for dtype in FLOATS}
        self._rest()

    def lacks(self, module: nn.Module) -> bool:
        """Tell whether `module` reads a weight, of its own or of its children, that is not at hand."""
        inside = set(module.modules())
        return any(owner in inside and name not in self.kept for owner, _, name in self._places)

    def cast(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return inputs whose floating-point tensors have the dtype that the suffix was moved to, if it was."""
        return map_arguments(lambda _, item: item.to(self._moved.get(item.dtype, item.dtype)), args, kwargs)

    @contextmanager
    def as_phantoms(self) -> Iterator[None]:
        """Put phantoms in place of the frozen parameters; those that are kept know their values."""
        with torch.inference_mode(False):  # they are kept for later steps, which may train
            self._haunt = self._haunt or {name: self._phantom(name) for name in self._resting}
        for module, attribute, name in self._places:
            module.__dict__.pop(attribute, None)
            module._parameters[attribute] = self._haunt[name]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, attribute, _ in self._places:
                module._parameters.pop(attribute, None)
            self._rest()

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (a move to a device or dtype) to the kept values, and let the stand-ins follow."""
        self.kept = {name: change(tensor) for name, tensor in self.kept.items()}
        for name, tensor in self._resting.items():
            moved = change(torch.zeros((), dtype=tensor.dtype, device=tensor.device)).expand(tensor.shape)
            self._resting[name] = self.kept[name] if name in self.kept else dummy(moved)
        self._moved = {dtype: change(torch.empty(0, dtype=to)).dtype for dtype, to in self._moved.items()}
        self._haunt = {}
        self._rest()

    def _phantom(self, name: str) -> Phantom:
        phantom = Phantom.like(self._resting[name], Weight(name))
        phantom.value = self.kept.get(name)
        return phantom

    def _rest(self) -> None:
        for module, attribute, name in self._places:
            module.__dict__[attribute] = self._resting[name]
