"""The frozen parameters of a suffix, which do not train and most of which it does not hold.

A parameter that the prefix reads leaves its module's `_parameters`, so that `parameters()`, `state_dict()`, `.to()`,
DDP and optimizers see only what trains. A plain attribute takes its place: the real tensor where the suffix reads its
values (a tied embedding), else a dummy of one element, expanded. It is NaN, so that a read nobody expected shows. For
a run on phantoms, phantoms take their places.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.split.cut import Weight
from pipeline.split.phantom import Phantom
from pipeline.split.tree import Args, Kwargs, map_arguments

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dummy(like: Tensor, *, dense: bool = False, device: torch.device | str | None = None) -> Tensor:
    """Return a tensor of the shape, dtype and device of `like`: NaN, or zero for other than floating point.

    The tensor takes the memory of one element. With `dense` each element has its own memory and can be written to.
    `device` overrides the device of `like`.
    """
    fill = float("nan") if like.dtype.is_floating_point or like.dtype.is_complex else 0
    shape = like.shape if dense else ()
    return torch.full(shape, fill, dtype=like.dtype, device=device or like.device).expand(like.shape)


class FrozenParameters:
    """The frozen parameters of one suffix's module tree; `kept` has the values that the suffix reads, by name."""

    def __init__(self, root: nn.Module, names: Mapping[str, str], kept: Mapping[str, Tensor]) -> None:
        """`names`: every frozen name in `root` -> the canonical one among those that are tied together."""
        modules = dict(root.named_modules(remove_duplicate=False))
        self.kept = dict(kept)
        self._places: list[tuple[nn.Module, str, str]] = []
        self._tensors: dict[str, Tensor] = {}
        for name, canonical in names.items():
            path, _, attribute = name.rpartition(".")
            parameter = modules[path]._parameters.pop(attribute, None)
            if parameter is None:  # the same module under a second path
                continue
            self._places.append((modules[path], attribute, canonical))
            self._tensors.setdefault(canonical, kept[canonical] if canonical in kept else dummy(parameter))
        self._moved = {dtype: dtype for dtype in FLOATS}
        self._put_tensors()

    def lacks(self, module: nn.Module) -> bool:
        """Return whether `module` reads a parameter, its own or a child's, whose values the suffix does not hold."""
        inside = set(module.modules())
        return any(owner in inside and name not in self.kept for owner, _, name in self._places)

    def cast(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return inputs whose floating-point tensors have the dtype that the suffix was moved to, if it was."""
        return map_arguments(lambda _, item: item.to(self._moved.get(item.dtype, item.dtype)), args, kwargs)

    @contextmanager
    def as_phantoms(self) -> Iterator[None]:
        """Put phantoms in place of the frozen parameters; those that are kept have their values."""
        put = {name: Phantom.like(item, Weight(name), self.kept.get(name)) for name, item in self._tensors.items()}
        for module, attribute, name in self._places:
            module.__dict__.pop(attribute, None)
            module._parameters[attribute] = put[name]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, attribute, _ in self._places:
                module._parameters.pop(attribute, None)
            self._put_tensors()

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (a move to a device or dtype) to the kept values, and make dummies to match."""
        self.kept = {name: change(tensor) for name, tensor in self.kept.items()}
        for name, tensor in self._tensors.items():
            moved = change(torch.zeros((), dtype=tensor.dtype, device=tensor.device)).expand(tensor.shape)
            self._tensors[name] = self.kept[name] if name in self.kept else dummy(moved)
        self._moved = {dtype: change(torch.empty(0, dtype=to)).dtype for dtype, to in self._moved.items()}
        self._put_tensors()

    def _put_tensors(self) -> None:
        for module, attribute, name in self._places:
            module.__dict__[attribute] = self._tensors[name]
