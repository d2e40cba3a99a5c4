"""A recording: how a step gets from its inputs to the cut without making the calls that can be skipped.

It is made by a run on phantoms. A whole call can be skipped when all it returns are phantoms (nobody reads their
values) or its own arguments, and nothing that is stored or read is made inside. The rest runs at each step as it is:
the callers of the cut, and whatever makes a value that is read, such as an attention mask.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.split.cut import Argument, Cut, Input, Output, TensorSource
from pipeline.split.frozen import dummy
from pipeline.split.inputs import ExampleInputs
from pipeline.split.phantom import Operation, Phantom, unknown_ancestors
from pipeline.split.phantom_run import CallKey, ObservedCall, PhantomRun
from pipeline.split.tree import Args, Kwargs, arguments, is_plain, map_arguments, map_tensors, tensors


class _CutReached(BaseException):
    """Ends a recording at the cut; not an Exception, so that no `except` in a model's code stops it."""


class Recorder(PhantomRun):
    """A run that notes which calls make values that are read, and which outputs are passed to the cut call."""

    def __init__(
        self,
        root: nn.Module,
        cut: Cut,
        values: Mapping[TensorSource, Tensor],
        inputs: ExampleInputs,
        *,
        to_the_end: bool,
    ) -> None:
        """`to_the_end`: whether the run goes on after the cut, so that values which are read there are noted."""
        super().__init__(root, cut, values, inputs)
        self.arguments_of_cut: dict[Output, Argument] = {}  # output of a call -> the argument as which it is stored
        self._to_the_end = to_the_end
        self._makers: dict[Operation, ObservedCall] = {}
        self._outputs: dict[Tensor, tuple[Output, object]] = {}  # phantoms that a call returned, and their origin then

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        with contextlib.suppress(_CutReached):
            return super().run(args, kwargs)

    def operate(self, function: Any, args: Args, kwargs: Kwargs) -> Any:
        result = super().operate(function, args, kwargs)
        for item in tensors(result).values():
            if isinstance(item, Phantom) and isinstance(item.origin, Operation):
                self._makers[item.origin] = self.open[-1]
        return result

    def force(self, item: Tensor) -> Tensor:
        if isinstance(item, Phantom):
            for ancestor in unknown_ancestors(item):
                if isinstance(ancestor.origin, Operation) and ancestor.origin in self._makers:
                    self._makers[ancestor.origin].read = True
        return super().force(item)

    def on_return(self, call: ObservedCall, output: Any) -> None:
        super().on_return(call, output)
        call.output = map_tensors(lambda _, item: dummy(item), output) if is_plain(output) else output
        taken = {id(item) for item in call.taken.values()}
        for leaf, item in tensors(output).items():
            passed_on = id(item) in taken and item in self._outputs
            if isinstance(item, Phantom) and not passed_on:
                self._outputs[item] = (Output(call.path, call.index, leaf), item.origin)

    def on_cut(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        for leaf, item in arguments(args, kwargs).items():
            if Argument(leaf) in self.values and isinstance(item, Phantom) and item in self._outputs:
                output, origin = self._outputs[item]
                if item.origin is origin:  # not changed in place since
                    self.arguments_of_cut[output] = Argument(leaf)
        entered = super().on_cut(args, kwargs)
        if not self._to_the_end:
            raise _CutReached
        return entered


def _divide_calls(
    recorder: Recorder, among: Collection[CallKey] | None
) -> tuple[list[ObservedCall], list[ObservedCall]]:
    """Return the outermost calls that can be skipped, and the calls that run all the same."""
    stored = {(source.path, source.call) for source in recorder.values if isinstance(source, Output)}
    skipped: list[ObservedCall] = []
    running: list[ObservedCall] = []
    counts: Counter[str] = Counter()
    pending = list(recorder.calls.children)
    while pending:
        call = pending.pop()
        call.number = counts[call.path]
        counts[call.path] += 1
        if (among is None or call.key in among) and _is_skippable(call, stored):
            skipped.append(call)
        else:
            running.append(call)
            pending += reversed(call.children)
    return skipped, running


def _is_skippable(call: ObservedCall, stored: set[CallKey]) -> bool:
    if call.returned is None or call.read or any(inner.read or inner.key in stored for inner in call.inside()):
        return False
    taken = {id(item) for item in call.taken.values()}
    returned = call.returned.values()
    return (
        is_plain(call.output)
        and any(isinstance(item, Phantom) for item in returned)
        and all(isinstance(item, Phantom) or id(item) in taken for item in returned)
    )


@dataclass(frozen=True)
class CallResult:
    """What a skipped call returns at each step.

    Attributes:
        output: the recorded output, with dummies for tensors.
        stored: leaf of the output -> the stored tensor that is returned there.
        passed: leaf of the output -> the argument of the same call that is returned there.
    """

    output: Any
    stored: Mapping[str, TensorSource]
    passed: Mapping[str, str]

    def __call__(self, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Return the output of the call for this step's stored `values` and arguments."""
        if isinstance(self.output, Tensor) and not self.passed:
            return values[self.stored[""]] if self.stored else self.output
        taken = arguments(args, kwargs) if self.passed else {}

        def leaf(path: str, item: Tensor) -> Tensor:
            if path in self.stored:
                return values[self.stored[path]]
            return taken[self.passed[path]] if path in self.passed else item

        return map_tensors(leaf, self.output)


@dataclass(frozen=True)
class Recording:
    """The way to the cut for inputs of one kind.

    Attributes:
        results: the skipped calls, by path and number. Calls inside skipped ones are not made, so they do not count.
        cut_call: number of the cut call among the calls of its module that are made.
        late: stored arguments of the cut call that no skipped call returns; they are put in on entry.
        dummies: inputs whose values are not there, by leaf; None for one that the state holds.
        shapes: shapes of the stored tensors that belong to these inputs.
        running: the modules that run before the cut.
        calls: the skipped calls, and the others that return before the cut.
    """

    results: Mapping[CallKey, CallResult]
    cut_call: int
    late: frozenset[str]
    dummies: Mapping[str, Tensor | None]
    shapes: Mapping[TensorSource, torch.Size]
    running: Sequence[nn.Module]
    calls: tuple[Set[CallKey], Set[CallKey]]

    def inputs(self, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return the model's inputs without the values that only the prefix reads."""
        if not self.dummies:
            return args, kwargs

        def replace(leaf: str, item: Tensor) -> Tensor:
            known = self.dummies.get(leaf, item)
            return values[Input(leaf)] if known is None else known

        return map_arguments(replace, args, kwargs)


def make_recording(
    run: Recorder, inputs: Mapping[str, Tensor], among: Collection[CallKey] | None = None, *, dense: bool
) -> Recording:
    """Return the recording for `inputs` like those of the `run`.

    `among`: the calls that may be skipped, as an earlier recording found them; all if not given. `dense` dummies can be
    written to.
    """
    skipped, running = _divide_calls(run, among)
    results = {(call.path, call.number): _result(call, run, dense) for call in skipped}
    returned = {source for result in results.values() for source in result.stored.values()}
    floats = {leaf: item for leaf, item in inputs.items() if run.inputs.is_placeholder(leaf, item)}
    return Recording(
        results=results,
        cut_call=next(call.number for call in running if call.key == (run.cut.path, run.cut.call)),
        late=frozenset(s.leaf for s in run.values if isinstance(s, Argument) and s not in returned),
        dummies={leaf: None if Input(leaf) in run.values else dummy(item) for leaf, item in floats.items()},
        shapes={source: value.shape for source, value in run.values.items()},
        running=[run.root.get_submodule(path) for path in {call.path for call in running}],
        calls=({call.key for call in skipped}, {call.key for call in running if call.returned is not None}),
    )


def _result(call: ObservedCall, run: Recorder, dense: bool) -> CallResult:
    returned = call.returned or {}
    taken = {id(item): leaf for leaf, item in call.taken.items()}
    sources: dict[int, TensorSource] = {}  # one tensor may be at several leaves
    for leaf, item in returned.items():
        place = Output(call.path, call.index, leaf)
        if place in run.values:
            sources[id(item)] = place
        elif place in run.arguments_of_cut:
            sources.setdefault(id(item), run.arguments_of_cut[place])
    stored = {leaf: sources[id(item)] for leaf, item in returned.items() if id(item) in sources}
    passed = {leaf: taken[id(item)] for leaf, item in returned.items() if id(item) in taken and leaf not in stored}

    def with_memory(leaf: str, item: Tensor) -> Tensor:
        return item if leaf in stored or leaf in passed else dummy(item, dense=True)

    return CallResult(map_tensors(with_memory, call.output) if dense else call.output, stored, passed)
