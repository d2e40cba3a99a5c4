"""What must cross the cut: discovered by running the suffix and seeing what it lacks.

The suffix is replayed on the example, in eval and in train mode, until it lacks nothing:
- an argument of the cut call is stored, unless it is cheap to recompute (a mask, a bias table with its mask);
- a skipped value that is read after the cut is stored as the output of the module that made it (a skip connection);
- a frozen parameter that is read after the cut is kept: the suffix holds a copy that does not train (tied embeddings).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.frozen import Frozen
from pipeline.split.modes import random_state_kept
from pipeline.split.phantom import Phantom, Step
from pipeline.split.reads import Reads
from pipeline.split.record import Tap, record
from pipeline.split.replay import Replay, ancestry
from pipeline.split.sources import Argument, Output, Source, Weight
from pipeline.split.trace import Trace
from pipeline.split.tree import Args, Kwargs, arguments

ROUNDS = 64
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
        sources: what the state holds.
        kept: canonical names of the frozen parameters that the suffix reads.
        written: sources whose values the suffix writes into.
    """

    cut: Cut
    frozen: dict[str, str]
    read: list[str]
    before: list[str]
    after: set[str]
    sources: list[Source] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    written: set[Source] = field(default_factory=set)


def make_plan(model: nn.Module, cut: Cut, trace: Trace, args: Args, kwargs: Kwargs) -> Plan:
    """Return what the suffix of `model` after `cut` needs, as found on one batch.

    Raises:
        SplitError: it needs something that no module before the cut returns.
    """
    plan = _survey(model, cut, trace, args, kwargs)
    weights = dict(model.named_parameters())
    tap = _tap(model, plan, args, kwargs)
    while True:
        root = share(model, copy_buffers=True)
        frozen = Frozen(root, plan.frozen, {name: weights[name].detach() for name in plan.kept})
        size = sum(item.numel() for item in weights.values())
        try:
            for training in (False, True):
                with random_state_kept(root), frozen.as_phantoms(), _told(cut, training):
                    Discovery(root.train(training), plan, tap.values, size).run(args, kwargs)
            return plan
        except Lacking as lack:
            _add(plan, lack, len(plan.sources) + len(plan.kept) < ROUNDS)
            tap = _tap(model, plan, args, kwargs)


@contextmanager
def _told(cut: Cut, training: bool) -> Iterator[None]:
    """Say where it was that the model's own code failed."""
    try:
        yield
    except SplitError:
        raise
    except Exception as error:
        mode = "train" if training else "eval"
        raise SplitError(
            f"split at {cut}: in {mode} mode the model fails on the example with its recycled layers left out "
            f"({type(error).__name__}: {error}); give an example that it can train on, or cut elsewhere"
        ) from error


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

    def run(self, args: Args, kwargs: Kwargs) -> object:
        output = super().run(args, kwargs)
        self.plan.written |= {source for source, value in self.values.items() if value._version}
        return output

    def output_paths(self) -> set[str]:
        return set(self.paths)

    def leave(self, path: str, call: int, args: Args, kwargs: Kwargs, output: object) -> None:
        super().leave(path, call, args, kwargs, output)
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


def share(model: nn.Module, *, copy_buffers: bool) -> nn.Module:
    """Return a copy of the modules of `model` that shares its parameters, and its buffers unless they are copied."""
    memo: dict[int, object] = {id(item): item for item in model.parameters()}
    if not copy_buffers:
        memo |= {id(item): item for item in model.buffers()}
    return copy.deepcopy(model, memo)


def _add(plan: Plan, lack: Lacking, more_allowed: bool) -> None:
    new = [
        need
        for need in lack.needs
        if need not in plan.sources and not (isinstance(need, Weight) and need.name in plan.kept)
    ]
    if not new or not more_allowed:
        raise SplitError(f"no state at {plan.cut} gives the suffix what it reads: {lack.needs}; cut elsewhere")
    for need in new:
        if isinstance(need, Weight):
            plan.kept.append(need.name)
        else:
            plan.sources.append(need)


def _tap(model: nn.Module, plan: Plan, args: Args, kwargs: Kwargs) -> Tap:
    tap = Tap(plan.cut, plan.sources)
    record(model, [tap], args, kwargs)
    return tap


def _survey(model: nn.Module, cut: Cut, trace: Trace, args: Args, kwargs: Kwargs) -> Plan:
    """See what is read and called before the cut; what is read there is frozen."""
    with Reads(model) as reads:
        record(model, [Tap(cut, ())], args, kwargs)
    start = next(call.start for call in trace.calls if (call.path, call.index) == (cut.path, cut.call))
    before = list(dict.fromkeys(call.path for call in trace.calls if call.start < start))
    after = {call.path for call in trace.calls if call.end > start}
    unused = _held(model, set(before) - after) - trace.reads
    return Plan(cut, _tied(model, reads.names | unused), sorted(reads.names), before, after)


def _held(model: nn.Module, paths: set[str]) -> set[str]:
    """The parameters that the modules at `paths` hold themselves."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.rpartition(".")[0] in paths}


def _tied(model: nn.Module, frozen: set[str]) -> dict[str, str]:
    """Every name of the frozen parameters -> the canonical name, under which the model lists it once."""
    canonical = {id(item): name for name, item in model.named_parameters()}
    everything = list(model.named_parameters(remove_duplicate=False))
    identities = {id(item) for name, item in everything if name in frozen}
    return {name: canonical[id(item)] for name, item in everything if id(item) in identities}
