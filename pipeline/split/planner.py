"""Making a plan: the suffix is replayed on the example, in eval and in train mode, until it lacks nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.frozen import Frozen
from pipeline.split.modes import errors_as_refusals, random_state_kept
from pipeline.split.opaque import close, sketch
from pipeline.split.plan import Discovery, Lacking, Plan
from pipeline.split.record import Tap, record
from pipeline.split.sources import Weight
from pipeline.split.splittable import copy_of
from pipeline.split.trace import Trace
from pipeline.split.tree import Args, Kwargs

ROUNDS = 64
LACKING = object()


@dataclass(frozen=True)
class Planned:
    """A plan, and the run of the suffix in eval mode that lacked nothing.

    Attributes:
        tap: what the full model had at the cut, from which the run started.
        output: what it returned.
    """

    plan: Plan
    tap: Tap
    output: Any


def make_plan(model: nn.Module, cut: Cut, trace: Trace, args: Args, kwargs: Kwargs) -> Planned:
    """Return what the suffix of `model` after `cut` needs, as found on one batch.

    Raises:
        SplitError: it needs something that no module before the cut returns.
    """
    plan = _survey(model, cut, trace)
    tap = Tap(cut, ())
    record(model, [tap], args, kwargs)
    for _ in range(ROUNDS):
        output = _replay(model, plan, tap, args, kwargs)
        if output is not LACKING:
            return Planned(plan, tap, output)
        if not tap.values.keys() >= set(plan.sources):
            tap = Tap(cut, list(plan.sources))
            record(model, [tap], args, kwargs)
    raise SplitError(f"split at {cut}: after {ROUNDS} rounds the suffix still lacks something; cut elsewhere")


def _replay(model: nn.Module, plan: Plan, tap: Tap, args: Args, kwargs: Kwargs) -> Any:
    """Replay the suffix in both modes; return its output in eval mode, or LACKING once the plan has grown."""
    weights = dict(model.named_parameters())
    size = sum(item.numel() for item in weights.values())
    root = _skeleton(model)
    close(root, plan.opaque)
    frozen = Frozen(root, plan.frozen, {name: weights[name].detach() for name in plan.kept})
    outputs = []
    for training in (False, True):
        discovery = Discovery(root.train(training), plan, tap.values, size)
        try:
            with random_state_kept(root), frozen.as_phantoms(), torch.set_grad_enabled(training):
                outputs.append(discovery.run(args, kwargs))
        except Lacking as lack:
            _add(plan, lack)
            return LACKING
        except Exception as error:
            if not _close_one(model, plan, discovery.stuck_in(), error, args, kwargs):
                if training:
                    _try_training(model, plan, args, kwargs)
                raise _told(plan.cut, training, error, discovery.place()) from error
            return LACKING
    return outputs[0]


def _close_one(model: nn.Module, plan: Plan, stuck: list[str], fault: Exception, args: Args, kwargs: Kwargs) -> bool:
    """Make the outermost call opaque that can be, of those that a `fault` ended; tell whether there is one.

    Raises:
        SplitError: there are such calls, but none can be seen from outside.
    """
    refusal = None
    for path in stuck:
        if path in plan.opaque:
            return False
        try:
            plan.opaque[path] = sketch(model, path, args, kwargs)
        except SplitError as error:
            refusal = refusal or error
        else:
            return True
    if refusal:
        raise SplitError(f"{refusal} ({fault})") from fault
    return False


def _told(cut: Cut, training: bool, error: Exception, place: str) -> SplitError:
    """Say where it was that the model's own code failed."""
    if isinstance(error, SplitError):
        return SplitError(f"{error} (met in {place})")
    return SplitError(
        f"split at {cut}: in {'train' if training else 'eval'} mode {place} fails on the example with the recycled "
        f"layers left out ({type(error).__name__}: {error}); give an example that it can train on, or cut elsewhere"
    )


def _try_training(model: nn.Module, plan: Plan, args: Args, kwargs: Kwargs) -> None:
    """Run a copy of the full model on the example, with what follows the cut in train mode.

    Raises:
        InputRefusedError: its own code fails in train mode.
    """
    root = _skeleton(model).train()
    for path in set(plan.before) - plan.after:
        root.get_submodule(path).training = False
    with torch.no_grad(), random_state_kept(root), errors_as_refusals(model, args, kwargs, "train"):
        root(*args, **kwargs)


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of the modules and buffers of `model` that shares its parameters."""
    return copy_of(model, {id(item): item for item in model.parameters()})


def _add(plan: Plan, lack: Lacking) -> None:
    needs = [*lack.needs]
    if any(isinstance(need, Weight) and need.name.rpartition(".")[0] in plan.again for need in needs):
        # One weight of shared layers will not be all.
        shared = [own for name, own in plan.frozen.items() if name.rpartition(".")[0] in plan.again]
        needs += map(Weight, dict.fromkeys(shared))
    new = [
        need
        for need in dict.fromkeys(needs)
        if need not in plan.sources and not (isinstance(need, Weight) and need.name in plan.kept)
    ]
    if not new:
        raise SplitError(f"no state at {plan.cut} gives the suffix what it reads: {lack.needs}; cut elsewhere")
    for need in new:
        if isinstance(need, Weight):
            plan.kept.append(need.name)
        else:
            plan.sources.append(need)


def _survey(model: nn.Module, cut: Cut, trace: Trace) -> Plan:
    """See what is read and called before the cut; what is read there is frozen."""
    start = trace.start_of(cut.path, cut.call)
    read = {name for name, tick in trace.reads.items() if tick < start}
    before = list(dict.fromkeys(call.path for call in trace.calls if call.start < start))
    after = {call.path for call in trace.calls if call.end > start}
    again = {call.path for call in trace.calls if call.start > start} & set(before)
    unused = _held(model, set(before) - after) - trace.reads.keys()
    return Plan(cut, _tied(model, read | unused), sorted(read), before, after, again)


def _held(model: nn.Module, paths: set[str]) -> set[str]:
    """The parameters that the modules at `paths` hold themselves."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.rpartition(".")[0] in paths}


def _tied(model: nn.Module, frozen: set[str]) -> dict[str, str]:
    """Every name of the frozen parameters -> the canonical name, under which the model lists it once."""
    canonical = {id(item): name for name, item in model.named_parameters()}
    everything = list(model.named_parameters(remove_duplicate=False))
    identities = {id(item) for name, item in everything if name in frozen}
    return {name: canonical[id(item)] for name, item in everything if id(item) in identities}
