"""The inputs of a model as its example gave them: their names, their shapes, and which of them the prefix reads."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.split.cut import argument_name
from pipeline.split.tree import Args, Kwargs, arguments


@dataclass(frozen=True)
class TensorSpec:
    """The dtype of a tensor of the state or of an input, and its shape on the example without the batch axis."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExampleInputs:
    """How the example called the model; without any, inputs are passed on as they are given.

    Attributes:
        specs: the tensors of the call by the names of the model's arguments, in the order of the call.
        positional: names of those that were given by position.
        read: names of those that the prefix reads.
        values: whether the suffix is given the values of all inputs that the prefix does not read.
        declared: names of all arguments of the model's `forward`, in their order.
        required: names of those without a default.
        is_open: whether it takes further keywords.
    """

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()
    values: bool = False
    declared: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    is_open: bool = False

    @classmethod
    def of(cls, model: nn.Module, args: Args, kwargs: Kwargs, read: Collection[str], *, values: bool) -> Self:
        """Describe the call `model(*args, **kwargs)`, of whose tensors the prefix reads those at the leaves `read`."""
        found = inspect.signature(model.forward).parameters.values()
        named = [one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        return cls(
            {
                argument_name(model, leaf): TensorSpec(item.dtype, tuple(item.shape[1:]))
                for leaf, item in arguments(args, kwargs).items()
            },
            tuple(argument_name(model, str(position)) for position in range(len(args))),
            frozenset(argument_name(model, leaf) for leaf in read),
            values,
            tuple(named),
            frozenset(one.name for one in found if one.name in named and one.default is one.empty),
            any(one.kind is one.VAR_KEYWORD for one in found),
        )

    def is_placeholder(self, leaf: str, item: Tensor) -> bool:
        """Return whether the values of an input are not there: it is floating point, and the state has what matters."""
        if not item.is_floating_point():
            return False
        position, dot, rest = leaf.partition(".")
        named = dict(enumerate(self.declared))
        name = f"{named.get(int(position))}{dot}{rest}" if position.isdigit() else leaf
        return not self.values or name in self.read

    def for_prefix(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return the call of the prefix with placeholders for arguments that must be given, and that it never reads."""
        like = next(iter(arguments(args, kwargs).values()), torch.empty(0))
        return self._as_example(args, kwargs, like, self.required - self.read)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def for_suffix(self, args: Args, kwargs: Kwargs, state: Mapping[str, Tensor]) -> tuple[Args, Kwargs]:
        """Return the call of the suffix with placeholders for floating-point inputs that only the prefix reads.

        Tensors with a batch axis and lists that the model takes no argument for, fields of a batch that are for others,
        are left out.
        """
        if self.declared:
            known = {*self.declared, *self.specs}
            kwargs = {name: item for name, item in kwargs.items() if name in known or not _is_field(item)}
        like = next(iter(state.values()), torch.empty(0))
        floats = {name for name in self.read if self.specs[name].dtype.is_floating_point}
        return self._as_example(args, kwargs, like, frozenset(floats))

    def _as_example(self, args: Args, kwargs: Kwargs, like: Tensor, absent: frozenset[str]) -> tuple[Args, Kwargs]:
        """Return the call with inputs by position where the example had them so, and those that are `absent`."""
        given, named = dict(zip(self.declared, args, strict=False)), dict(kwargs)
        for name, spec in self.specs.items():
            if name in absent - given.keys() - named.keys() and "." not in name and like.dim():
                named[name] = like.new_zeros((), dtype=spec.dtype).expand(len(like), *spec.shape)
        moved = list(args)
        for name in self.positional[len(args) :]:
            if name not in named:
                break
            moved.append(named.pop(name))
        return tuple(moved), named


def _is_field(item: object) -> bool:
    """Return whether a value can be a field of a batch, with an entry for each sample."""
    return item.dim() > 0 if isinstance(item, Tensor) else isinstance(item, list)
