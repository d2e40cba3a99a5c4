"""The plan of a split, and the search for what it lacks: a run of the suffix on phantoms.

- An argument of the cut call is stored, unless it is cheap to compute again (a mask, a bias table with its mask).
- A value from before the cut that is read after it is stored as the output of the module that made it (a skip
  connection).
- A frozen parameter that is read after the cut is kept: the suffix holds a copy that does not train (tied embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.cut import Cut
from pipeline.split.fake_forward import FakeForward
from pipeline.split.phantom import Operation, Phantom, unknown_ancestors
from pipeline.split.phantom_run import ObservedCall, PhantomRun
from pipeline.split.sources import Argument, Output, TensorSource, Weight
from pipeline.split.tree import Args, Kwargs, arguments, tensors

CHEAP_OPERATIONS = 200
CHEAP_WEIGHTS = 0.005  # share of the model's parameters that a recomputed argument may keep in the suffix


@dataclass
class SplitPlan:
    """The parts of a split.

    Attributes:
        frozen: every name of a parameter that does not train -> the canonical one of those tied together.
        read: names of the parameters and buffers that the prefix reads.
        before: modules called before the cut, in order of their first call.
        after: modules that run after the cut, its callers included.
        again: modules that are called before the cut and once more after it.
        sources: what the state holds.
        kept: canonical names of the frozen parameters that the suffix reads.
        written: sources whose values the suffix writes into.
        fake_forwards: modules before the cut that cannot run on phantoms.
    """

    cut: Cut
    frozen: dict[str, str]
    read: list[str]
    before: list[str]
    after: set[str]
    again: set[str]
    sources: list[TensorSource] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    written: set[TensorSource] = field(default_factory=set)
    fake_forwards: dict[str, FakeForward] = field(default_factory=dict)


class MissingValues(BaseException):
    """The suffix reads what the plan does not provide; not an Exception, so that no model's code stops it."""

    def __init__(self, needs: list[TensorSource | Weight]) -> None:
        super().__init__(str(needs))
        self.needs = needs


class DependencySearch(PhantomRun):
    """A run that raises MissingValues where the plan lacks something, and adds cut arguments and writes to the plan."""

    def __init__(
        self, root: nn.Module, plan: SplitPlan, observed: Mapping[TensorSource, Tensor], parameters: int
    ) -> None:
        """`observed`: what the full model has at the cut; `parameters`: how many numbers its parameters hold."""
        super().__init__(root, plan.cut, {source: value.clone() for source, value in observed.items()})
        self.plan = plan
        self.parameters = parameters

    def run(self, args: Args, kwargs: Kwargs) -> object:
        output = super().run(args, kwargs)
        self.plan.written |= {source for source, value in self.values.items() if value._version}
        return output

    def unfinished_calls(self) -> list[str]:
        """Return the calls before the cut that did not return, other than the callers of the cut, outermost first."""
        return [] if self.entered else [call.path for call in self.open if call.path not in self.plan.after]

    def place(self) -> str:
        """Return the innermost module that did not return, as messages name it."""
        path = "" if self.entered else self.open[-1].path
        return f"module {path!r}" if path else "the model's forward"

    def on_return(self, call: ObservedCall, output: Any) -> None:
        super().on_return(call, output)
        taken = {id(item) for item in call.taken.values()}
        for leaf, item in tensors(output).items():
            if isinstance(item, Phantom) and isinstance(item.origin, Operation | None):
                passed_on = item.module_output is not None and id(item) in taken
                item.module_output = item.module_output if passed_on else Output(call.path, call.index, leaf)

    def on_cut(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        for leaf, item in arguments(args, kwargs).items():
            if isinstance(item, Phantom) and item.value is None and Argument(leaf) not in self.plan.sources:
                self.store_or_recompute(leaf, item)
        self.values = {source: value for source, value in self.values.items() if source in self.plan.sources}
        return super().on_cut(args, kwargs)

    def store_or_recompute(self, leaf: str, argument: Phantom) -> None:
        """Decide whether an argument of the cut call is stored or computed again; a bare parameter is kept."""
        bare: list[TensorSource | Weight] = [argument.origin] if isinstance(argument.origin, Weight) else []
        weights = bare or self.weights_to_recompute(argument)
        if weights:
            raise MissingValues(weights)
        if weights is None:
            self.plan.sources.append(Argument(leaf))

    def weights_to_recompute(self, phantom: Phantom) -> list[TensorSource | Weight] | None:
        """Return the parameters to keep so that `phantom` can be computed again, or None where that is not cheap."""
        ancestors = unknown_ancestors(phantom)
        leaves = [item for item in ancestors if not isinstance(item.origin, Operation)]
        weights = [item.origin for item in leaves if isinstance(item.origin, Weight)]
        size = sum(item.numel() for item in leaves)
        cheap = len(ancestors) <= CHEAP_OPERATIONS and size <= CHEAP_WEIGHTS * self.parameters
        return list(weights) if cheap and len(weights) == len(leaves) else None

    def require_values(self, function: object, needed: list[Phantom]) -> None:
        for phantom in needed:
            weights = self.weights_to_recompute(phantom)
            if weights:
                raise MissingValues(weights)
        super().require_values(function, needed)

    def on_missing_value(self, phantom: Phantom) -> None:
        raise MissingValues(self.weights_to_recompute(phantom) or self.nearest_sources(phantom))

    def nearest_sources(self, phantom: Phantom) -> list[TensorSource | Weight]:
        """Return the closest places before the cut that together determine `phantom`."""
        found: list[TensorSource | Weight] = []
        visited: set[int] = set()
        pending = [phantom]
        while pending:
            item = pending.pop(0)
            if item.value is not None or id(item) in visited:
                continue
            visited.add(id(item))
            if item.module_output is not None:
                found.append(item.module_output)
            elif isinstance(item.origin, Operation):
                pending += item.origin.parents()
            elif item.origin is not None:
                found.append(item.origin)
            else:
                raise SplitError(
                    f"after the cut {self.cut} the model reads a value (shape {tuple(item.shape)}) that was changed in "
                    "place before it and that no module returns; cut elsewhere"
                )
        return found
