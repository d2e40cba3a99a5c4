"""A cut, the point in time at which a forward pass is divided, and the sources of the tensors that cross it.

It is no place in the module tree: everything that the model executes before the entry to one call is prefix. Three
sources can be observed without touching the model's code: the arguments of the cut call, the output of an earlier
module call (a skip connection), and an input of the model. Parameters are named the same way, as origins of phantoms.
"""

import inspect
import itertools
import re
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn


@dataclass(frozen=True)
class Cut:
    """The entry to call number `call` of module `path`; the empty path is the model itself.

    Attributes:
        blocks_before: how many of the network's blocks run before it.
        blocks: how many blocks the network has.
    """

    path: str
    call: int
    blocks_before: int
    blocks: int

    @property
    def share(self) -> float:
        """The share of the blocks that run before the cut, 0 to 1."""
        return self.blocks_before / self.blocks if self.blocks else 0.0

    @property
    def name(self) -> str:
        """The cut as `split` takes it: a module path, or `layer#2` for its third call; empty for the inputs."""
        return f"{self.path}#{self.call}" if self.call else self.path

    def __str__(self) -> str:
        place = self.path or "the inputs"
        again = f" (call {self.call})" if self.call else ""
        return f"{place}{again}, after {self.blocks_before} of {self.blocks} blocks"


@dataclass(frozen=True)
class Argument:
    """The tensor at `leaf` among the arguments of the cut call."""

    leaf: str


@dataclass(frozen=True)
class Output:
    """The tensor at `leaf` in the output of call number `call` of module `path`."""

    path: str
    call: int
    leaf: str


@dataclass(frozen=True)
class Input:
    """The tensor at `leaf` among the inputs of the model."""

    leaf: str


@dataclass(frozen=True)
class Weight:
    """The parameter `name` of the model."""

    name: str


TensorSource: TypeAlias = Argument | Output | Input


def state_names(model: nn.Module, cut_module: nn.Module, sources: list[TensorSource]) -> dict[TensorSource, str]:
    """Return a readable, unique, file-safe name for each source: `hidden_states`, `layer2.1.out`, `pixel_values`."""
    names: dict[TensorSource, str] = {}
    for source in sources:
        match source:
            case Argument(leaf):
                name = argument_name(cut_module, leaf)
            case Output(path, call, leaf):
                name = ".".join(part for part in (path, f"call{call}" if call else "", "out", leaf) if part)
            case Input(leaf):
                name = argument_name(model, leaf)
                name = f"input.{name}" if name in names.values() else name
        base = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
        numbered = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        names[source] = next(name for name in numbered if name not in names.values())
    return names


def argument_name(module: nn.Module, leaf: str) -> str:
    """Return `leaf` with a leading position replaced by the name of that parameter of `module.forward`."""
    position, dot, rest = leaf.partition(".")
    if not position.isdigit():
        return leaf
    named = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    index = int(position)
    return (named[index] if index < len(named) else f"arg{index}") + dot + rest
