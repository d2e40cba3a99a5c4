"""Making a plan: the suffix runs on phantoms, in eval and in train mode, until the plan lacks nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import SplitError
from pipeline.split.cut import Cut
from pipeline.split.fake_forward import install_fake_forwards, observe_forward
from pipeline.split.frozen import FrozenParameters
from pipeline.split.modes import random_state_kept
from pipeline.split.observation import Observation, observe
from pipeline.split.plan import DependencySearch, MissingValues, SplitPlan
from pipeline.split.reference import run_in_training
from pipeline.split.sources import Weight
from pipeline.split.splittable import copy_of
from pipeline.split.trace import Trace
from pipeline.split.tree import Args, Kwargs

ROUNDS = 64
INCOMPLETE = object()


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


def make_plan(model: nn.Module, cut: Cut, trace: Trace, args: Args, kwargs: Kwargs) -> Planned:
    """Return what the suffix of `model` after `cut` needs, as found on one batch.

    Raises:
        SplitError: it needs something that no module before the cut returns.
    """
    plan = initial_plan(model, cut, trace)
    observation = Observation(cut, ())
    observe(model, [observation], args, kwargs)
    for _ in range(ROUNDS):
        output = _run_suffix(model, plan, observation, args, kwargs)
        if output is not INCOMPLETE:
            return Planned(plan, observation, output)
        if not observation.values.keys() >= set(plan.sources):
            observation = Observation(cut, list(plan.sources))
            observe(model, [observation], args, kwargs)
    raise SplitError(f"split at {cut}: after {ROUNDS} rounds the suffix still lacks something; cut elsewhere")


def initial_plan(model: nn.Module, cut: Cut, trace: Trace) -> SplitPlan:
    """Return the plan that a traced forward pass shows: what is called and read before the cut, which is frozen."""
    start = next(call.start for call in trace.calls if (call.path, call.index) == (cut.path, cut.call))
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


def _run_suffix(model: nn.Module, plan: SplitPlan, observation: Observation, args: Args, kwargs: Kwargs) -> Any:
    """Run the suffix in both modes; return its output in eval mode, or INCOMPLETE once the plan was extended."""
    weights = dict(model.named_parameters())
    size = sum(item.numel() for item in weights.values())
    root = copy_of(model, {id(item): item for item in model.parameters()})
    install_fake_forwards(root, plan.fake_forwards)
    frozen = FrozenParameters(root, plan.frozen, {name: weights[name].detach() for name in plan.kept})
    outputs = []
    for training in (False, True):
        search = DependencySearch(root.train(training), plan, observation.values, size)
        try:
            with random_state_kept(root), frozen.as_phantoms(), torch.set_grad_enabled(training):
                outputs.append(search.run(args, kwargs))
        except MissingValues as missing:
            _extend(plan, missing)
            return INCOMPLETE
        except Exception as error:
            if not _fake_a_call(model, plan, search.unfinished_calls(), error, args, kwargs):
                if training:
                    run_in_training(model, plan.cut, args, kwargs)
                raise _with_place(plan.cut, training, error, search.place()) from error
            return INCOMPLETE
    return outputs[0]


def _fake_a_call(
    model: nn.Module, plan: SplitPlan, unfinished: list[str], cause: Exception, args: Args, kwargs: Kwargs
) -> bool:
    """Plan a fake `forward` for the outermost possible call of those that `cause` ended; return whether one is."""
    refusal = None
    for path in unfinished:
        if path in plan.fake_forwards:
            return False
        try:
            plan.fake_forwards[path] = observe_forward(model, path, args, kwargs)
        except SplitError as error:
            refusal = refusal or error
        else:
            return True
    if refusal:
        raise SplitError(f"{refusal} ({cause})") from cause
    return False


def _with_place(cut: Cut, training: bool, error: Exception, place: str) -> SplitError:
    """Return the error of the model's own code with the place where it failed."""
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
