"""The plan of a split: what is frozen, what the state holds, and what runs before and after the cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from pipeline.split.cut import Cut
from pipeline.split.fake_forward import FakeForward
from pipeline.split.sources import TensorSource
from pipeline.split.trace import Trace


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


def initial_plan(model: nn.Module, cut: Cut, trace: Trace) -> SplitPlan:
    """Return the plan that a traced forward pass shows: what is called and read before the cut, which is frozen."""
    start = trace.start_of(cut.path, cut.call)
    read = {name for name, tick in trace.reads.items() if tick < start}
    before = list(dict.fromkeys(call.path for call in trace.calls if call.start < start))
    after = {call.path for call in trace.calls if call.end > start}
    again = {call.path for call in trace.calls if call.start > start} & set(before)
    held = {name for name, _ in model.named_parameters(remove_duplicate=False) if _owner(name) in set(before) - after}
    unused = held - trace.reads.keys()
    return SplitPlan(cut, _with_tied_names(model, read | unused), sorted(read), before, after, again)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _with_tied_names(model: nn.Module, frozen: set[str]) -> dict[str, str]:
    """Return every name of the frozen parameters -> the canonical name, under which the model lists it once."""
    canonical = {id(item): name for name, item in model.named_parameters()}
    everything = list(model.named_parameters(remove_duplicate=False))
    identities = {id(item) for name, item in everything if name in frozen}
    return {name: canonical[id(item)] for name, item in everything if id(item) in identities}
