"""What must cross the cut: discovered by running the suffix and seeing what it lacks.

The suffix is replayed on the example, in eval and in train mode, until it lacks nothing:
- an argument of the cut call is stored, unless it is cheap to recompute (a mask, a bias table with its mask);
- a skipped value that is read after the cut is stored as the output of the module that made it (a skip connection);
- a frozen parameter that is read after the cut is kept: the suffix holds a copy that does not train (tied embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.opaque import Sketch
from pipeline.split.phantom import Phantom, Step
from pipeline.split.replay import Replay, ancestry
from pipeline.split.sources import Argument, Output, Source, Weight
from pipeline.split.tree import Args, Kwargs, arguments

CHEAP_STEPS = 200
CHEAP_WEIGHTS = 0.005  # share of the model's parameters that a recomputed argument may keep in the suffix


@dataclass
class Plan:
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
        opaque: modules before the cut that phantoms cannot go through.
    """

    cut: Cut
    frozen: dict[str, str]
    read: list[str]
    before: list[str]
    after: set[str]
    again: set[str]
    sources: list[Source] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    written: set[Source] = field(default_factory=set)
    opaque: dict[str, Sketch] = field(default_factory=dict)


class Lacking(BaseException):
    """The suffix reads what the plan does not provide; not an Exception, so that no model's code stops it."""

    def __init__(self, needs: list[Source | Weight]) -> None:
        super().__init__(str(needs))
        self.needs = needs


class Discovery(Replay):
    """A replay that says what the plan lacks."""

    def __init__(self, root: nn.Module, plan: Plan, taken: Mapping[Source, Tensor], parameters: int) -> None:
        super().__init__(root, plan.cut, {source: value.clone() for source, value in taken.items()})
        self.plan = plan
        self.paths = dict.fromkeys(path for path in plan.before if path)
        self.parameters = parameters
        self._open: list[str] = []

    def run(self, args: Args, kwargs: Kwargs) -> object:
        output = super().run(args, kwargs)
        self.plan.written |= {source for source, value in self.values.items() if value._version}
        return output

    def stuck_in(self) -> list[str]:
        """Return the calls before the cut that did not return, other than the callers of the cut, outermost first."""
        return [] if self.entered else [path for path in self._open if path not in self.plan.after]

    def place(self) -> str:
        """Return the innermost module that had not returned, as messages name it."""
        path = "" if self.entered or not self._open else self._open[-1]
        return f"module {path!r}" if path else "the model's forward"

    def output_paths(self) -> set[str]:
        return set(self.paths)

    def _hooks(self) -> list[Any]:
        def visit(path: str) -> Any:
            return lambda *_: None if self.entered else self._open.append(path)

        modules = dict(self.root.named_modules())
        return [modules[path].register_forward_pre_hook(visit(path)) for path in self.paths] + super()._hooks()

    def leave(self, path: str, call: int, args: Args, kwargs: Kwargs, output: object) -> None:
        super().leave(path, call, args, kwargs, output)
        self._open.pop()
        taken = {id(item) for item in arguments(args, kwargs).values()}
        for leaf, item in arguments((output,), {}).items():
            if (
                isinstance(item, Phantom)
                and isinstance(item.origin, Step | None)
                and not (item.tag and id(item) in taken)
            ):
                item.tag = Output(path, call, leaf.partition(".")[2])

    def enter(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        for leaf, item in arguments(args, kwargs).items():
            if isinstance(item, Phantom) and item.value is None and Argument(leaf) not in self.plan.sources:
                self.judge(leaf, item)
        self.values = {source: value for source, value in self.values.items() if source in self.plan.sources}
        return super().enter(args, kwargs)

    def judge(self, leaf: str, argument: Phantom) -> None:
        """Decide whether an argument of the cut call is stored or recomputed; a bare parameter is kept."""
        bare: list[Source | Weight] = [argument.origin] if isinstance(argument.origin, Weight) else []
        weights = bare or self.cheap_weights(argument)
        if weights:
            raise Lacking(weights)
        if weights is None:
            self.plan.sources.append(Argument(leaf))

    def cheap_weights(self, phantom: Phantom) -> list[Source | Weight] | None:
        """Return the parameters to keep so that `phantom` can be recomputed, or None where that is not cheap."""
        line = ancestry(phantom)
        leaves = [item for item in line if not isinstance(item.origin, Step)]
        weights = [item.origin for item in leaves if isinstance(item.origin, Weight)]
        size = sum(item.numel() for item in leaves)
        if len(weights) < len(leaves) or len(line) > CHEAP_STEPS or size > CHEAP_WEIGHTS * self.parameters:
            return None
        return list(weights)

    def want_value(self, function: object, needed: list[Phantom]) -> None:
        for phantom in needed:
            weights = self.cheap_weights(phantom)
            if weights:
                raise Lacking(weights)
        super().want_value(function, needed)

    def lack(self, phantom: Phantom) -> None:
        raise Lacking(self.cheap_weights(phantom) or self.nearest(phantom))

    def nearest(self, phantom: Phantom) -> list[Source | Weight]:
        """Return the closest places before the cut that together determine `phantom`."""
        found: list[Source | Weight] = []
        passed: set[int] = set()
        pending = [phantom]
        while pending:
            item = pending.pop(0)
            if item.value is not None or id(item) in passed:
                continue
            passed.add(id(item))
            if item.tag is not None:
                found.append(item.tag)
            elif isinstance(item.origin, Step):
                pending += item.origin.parents()
            elif item.origin is not None:
                found.append(item.origin)
            else:
                raise SplitError(
                    f"after the cut {self.cut} the model reads a value (shape {tuple(item.shape)}) that was changed in "
                    "place before it and that no module returns; cut elsewhere"
                )
        return found
