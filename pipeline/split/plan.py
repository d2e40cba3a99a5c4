"""Making the plan of a split: the suffix runs on phantoms, in eval and in train mode, until the plan lacks nothing.

- An argument of the cut call is stored, unless it is cheap to compute again (a mask, a bias table with its mask).
- A value from before the cut that is read after it is stored as the output of the module that made it (a skip
  connection).
- A frozen parameter that is read after the cut is kept: the suffix holds a copy that does not train (tied embeddings).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import parameter_count
from pipeline.split.cut import Argument, Cut, Output, TensorSource, Weight
from pipeline.split.forward import Trace, random_state_kept, value_of
from pipeline.split.frozen import FrozenParameters
from pipeline.split.inputs import ExampleInputs
from pipeline.split.observation import Observation, observe, run_in_training
from pipeline.split.phantom import Operation, Phantom, unknown_ancestors
from pipeline.split.phantom_run import FakeForward, ObservedCall, PhantomRun, install_fake_forwards, observe_forward
from pipeline.split.splittable import copy_of
from pipeline.split.tree import Args, Kwargs, arguments, tensors

ROUNDS = 64
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
        blocks: the blocks of the model, in order of their first call.
        sources: what the state holds.
        kept: canonical names of the frozen parameters that the suffix reads.
        written: sources whose values the suffix writes into.
        fake_forwards: modules before the cut that cannot run on phantoms.
        inputs: how the example called the model.
    """

    cut: Cut
    frozen: dict[str, str]
    read: list[str]
    before: list[str]
    after: set[str]
    again: set[str]
    blocks: list[str] = field(default_factory=list)
    sources: list[TensorSource] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    written: set[TensorSource] = field(default_factory=set)
    fake_forwards: dict[str, FakeForward] = field(default_factory=dict)
    inputs: ExampleInputs = field(default_factory=ExampleInputs)


class MissingValues(BaseException):
    """The suffix reads what the plan does not provide; not an Exception, so that no model's code stops it."""

    def __init__(self, needs: Sequence[TensorSource | Weight]) -> None:
        super().__init__(str(needs))
        self.needs = needs


class DependencySearch(PhantomRun):
    """A run that raises MissingValues where the plan lacks something, and adds cut arguments and writes to the plan."""

    def __init__(
        self, root: nn.Module, plan: SplitPlan, observed: Mapping[TensorSource, Tensor], parameters: int
    ) -> None:
        """`observed`: what the full model has at the cut; `parameters`: how many numbers its parameters hold."""
        super().__init__(root, plan.cut, observed, plan.inputs)
        self.plan = plan
        self.parameters = parameters

    def run(self, args: Args, kwargs: Kwargs) -> object:
        output = super().run(args, kwargs)
        self.plan.written |= {source for source, value in self.values.items() if value._version}
        return output

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
                # The suffix keeps a parameter that is passed to the cut call itself, small or large.
                weights = [item.origin] if isinstance(item.origin, Weight) else self.weights_to_recompute(item)
                if weights:
                    raise MissingValues(weights)
                if weights is None:
                    self.plan.sources.append(Argument(leaf))
        self.values = {source: value for source, value in self.values.items() if source in self.plan.sources}
        return super().on_cut(args, kwargs)

    def weights_to_recompute(self, phantom: Phantom) -> list[Weight] | None:
        """Return the parameters to keep so that `phantom` can be computed again, or None where that is not cheap."""
        ancestors = unknown_ancestors(phantom)
        leaves = [item for item in ancestors if not isinstance(item.origin, Operation)]
        weights = [item.origin for item in leaves if isinstance(item.origin, Weight)]
        size = sum(item.numel() for item in leaves)
        cheap = len(ancestors) <= CHEAP_OPERATIONS and size <= CHEAP_WEIGHTS * self.parameters
        return weights if cheap and len(weights) == len(leaves) else None

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
        for item in unknown_ancestors(phantom, up_to_outputs=True):
            place = item.module_output or item.origin
            if place is None:
                raise SplitError(
                    f"after the cut {self.cut} the model reads a value (shape {tuple(item.shape)}) that was changed in "
                    "place before it and that no module returns; cut elsewhere"
                )
            if not isinstance(place, Operation):
                found.append(place)
        return found


@dataclass(frozen=True)
class Planned:
    """A complete plan, and the run of the suffix in eval mode that shows it.

    Attributes:
        observation: what the full model had at the cut, from which the run went on.
        output: the output of the run.
    """

    plan: SplitPlan
    observation: Observation
    output: Any


def make_plan(model: nn.Module, cut: Cut, trace: Trace, args: Args, kwargs: Kwargs, *, values: bool = False) -> Planned:
    """Return what the suffix of `model` after `cut` needs, as found on one batch, or raise SplitError.

    `values`: whether it will be given the values of all inputs that are not read before the cut.
    """
    plan = initial_plan(model, cut, trace)
    observation = Observation(cut, ())
    observe(model, [observation], args, kwargs)
    read = trace.inputs_read(cut, args, kwargs, observation.values.values())
    plan.inputs = ExampleInputs.of(model, args, kwargs, read, values=values)
    for _ in range(ROUNDS):
        outputs = _run_suffix(model, plan, observation, args, kwargs)
        if outputs:
            return Planned(plan, observation, outputs[0])
        if not observation.values.keys() >= set(plan.sources):
            observation = Observation(cut, list(plan.sources))
            observe(model, [observation], args, kwargs)
    raise SplitError(f"split at {cut}: after {ROUNDS} rounds the suffix still lacks something; cut elsewhere")


def initial_plan(model: nn.Module, cut: Cut, trace: Trace) -> SplitPlan:
    """Return the plan by a traced forward pass: modules it calls and weights it reads before the cut are frozen."""
    start = trace.start(cut.path, cut.call)
    read = {name for name, tick in trace.reads.items() if tick < start}
    before = list(dict.fromkeys(call.path for call in trace.calls if call.start < start))
    after = {call.path for call in trace.calls if call.end > start}
    again = {call.path for call in trace.calls if call.start > start} & set(before)
    own = model.named_parameters(remove_duplicate=False)
    unused = {name for name, _ in own if name.rpartition(".")[0] in set(before) - after} - trace.reads.keys()
    return SplitPlan(cut, _with_tied_names(model, read | unused), sorted(read), before, after, again)


def _with_tied_names(model: nn.Module, frozen: set[str]) -> dict[str, str]:
    """Return every name of the frozen parameters -> the canonical name, under which the model lists it once."""
    canonical = {id(item): name for name, item in model.named_parameters()}
    everything = list(model.named_parameters(remove_duplicate=False))
    identities = {id(item) for name, item in everything if name in frozen}
    return {name: canonical[id(item)] for name, item in everything if id(item) in identities}


def _run_suffix(model: nn.Module, plan: SplitPlan, observation: Observation, args: Args, kwargs: Kwargs) -> list[Any]:
    """Return the outputs of the suffix in eval and in train mode; none if the plan was incomplete and is extended."""
    weights = dict(model.named_parameters())
    root = copy_of(model, {id(item): item for item in model.parameters()})
    install_fake_forwards(root, plan.fake_forwards)
    frozen = FrozenParameters(root, plan.frozen, {name: value_of(weights[name]) for name in plan.kept})
    outputs = []
    for training in (False, True):
        search = DependencySearch(root.train(training), plan, observation.values, parameter_count(model))
        try:
            with random_state_kept(root), frozen.as_phantoms(), torch.set_grad_enabled(training):
                outputs.append(search.run(args, kwargs))
        except MissingValues as missing:
            _extend(plan, missing)
            return []
        except Exception as error:
            unfinished = [call.path for call in search.open if call.path not in plan.after]
            if not _fake_a_call(model, plan, unfinished, error, args, kwargs):
                if training:
                    run_in_training(model, plan.cut, args, kwargs)
                raise _with_place(plan.cut, training, error, search.open[-1].path) from error
            return []
    return outputs


def _fake_a_call(
    model: nn.Module, plan: SplitPlan, unfinished: list[str], cause: Exception, args: Args, kwargs: Kwargs
) -> bool:
    """Plan a fake `forward` for the first possible call of those that `cause` ended; return whether one is."""
    refusal = None
    for path in unfinished:
        if path in plan.fake_forwards:
            return False
        try:
            plan.fake_forwards[path] = observe_forward(model, path, args, kwargs)
            return True
        except SplitError as error:
            refusal = refusal or error
    if refusal:
        raise SplitError(f"{refusal} ({cause})") from cause
    return False


def _with_place(cut: Cut, training: bool, error: Exception, path: str) -> SplitError:
    """Return the error of the model's own code with the place where it failed: in the module at `path`."""
    place = f"module {path!r}" if path else "the model's forward"
    if isinstance(error, SplitError):
        return SplitError(f"{error} (met in {place})")
    return SplitError(
        f"split at {cut}: in {'train' if training else 'eval'} mode {place} fails on the example with the recycled "
        f"layers left out ({type(error).__name__}: {error}); give an example that it can train on, or cut elsewhere"
    )


def _extend(plan: SplitPlan, missing: MissingValues) -> None:
    """Add what is missing to the sources and kept parameters of `plan`."""
    needs = [*missing.needs]
    if any(isinstance(need, Weight) and need.name.rpartition(".")[0] in plan.again for need in needs):
        # A layer that runs on both sides of the cut reads all its weights: keep them in one round.
        shared = [own for name, own in plan.frozen.items() if name.rpartition(".")[0] in plan.again]
        needs += map(Weight, dict.fromkeys(shared))
    known = {*plan.sources, *map(Weight, plan.kept)}
    new = [need for need in dict.fromkeys(needs) if need not in known]
    if not new:
        raise SplitError(f"no state at {plan.cut} gives the suffix what it reads: {missing.needs}; cut elsewhere")
    for need in new:
        if isinstance(need, Weight):
            plan.kept.append(need.name)
        else:
            plan.sources.append(need)
