"""Stand-ins for the calls before the cut, so that a step reaches it within microseconds.

A shell takes the place of a module's `forward`. While a step is before the cut it replies with what was recorded:
stored tensors where the state holds them, so that every later reference to that output is right, arguments passed
through, and storage-less dummies for the values that nobody reads. From the cut on every shell is the module's own
`forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.frozen import dummy
from pipeline.split.phantom import before_the_cut
from pipeline.split.recording import Recorder, Visit, numbers_met
from pipeline.split.sources import Argument, Input, Output, Source, unfit
from pipeline.split.tree import Args, Kwargs, arguments, map_arguments, map_tensors


@dataclass(frozen=True)
class Reply:
    """What a skipped call returns.

    Attributes:
        output: the recorded output, with dummies in place of phantoms.
        stored: leaf of the output -> the source that the state holds for it.
        passed: leaf of the output -> the argument of the same call that it is.
    """

    output: Any
    stored: Mapping[str, Source]
    passed: Mapping[str, str]

    def __call__(self, values: Mapping[Source, Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Return the output of the call for this step's stored `values` and arguments."""
        if isinstance(self.output, Tensor) and not self.passed:
            return values[self.stored[""]] if self.stored else self.output
        taken = arguments(args, kwargs) if self.passed else {}

        def leaf(path: str, item: Tensor) -> Tensor:
            if path in self.stored:
                return values[self.stored[path]]
            return taken[self.passed[path]] if path in self.passed else item

        return map_tensors(leaf, self.output)


@dataclass
class Script:
    """How to reach the cut with inputs of one signature.

    Attributes:
        replies: the skipped calls, by path and number. Calls inside skipped ones never come, so they do not count.
        cut_call: number of the cut call among the calls of its module that come.
        late: stored arguments of the cut call that no skipped call returns; they are put in on entry.
        dummies: floating-point inputs, by leaf; None for one that the state holds.
        shapes: shapes of the stored values that go with these inputs.
    """

    replies: dict[tuple[str, int], Reply]
    cut_call: int
    late: frozenset[str]
    dummies: dict[str, Tensor | None]
    shapes: dict[Source, torch.Size]

    def check(self, values: Mapping[Source, Tensor]) -> None:
        """Raise SplitError unless stored `values` belong to a batch like the inputs'."""
        for source, shape in self.shapes.items():
            if values[source].shape != shape:
                raise unfit(source, values[source].shape, shape)

    def inputs(self, values: Mapping[Source, Tensor], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return the model's inputs without the values that only the prefix reads."""
        if not self.dummies:
            return args, kwargs

        def replace(leaf: str, item: Tensor) -> Tensor:
            known = self.dummies.get(leaf, item)
            return values[Input(leaf)] if known is None else known

        return map_arguments(replace, args, kwargs)


def write_script(recorder: Recorder, skipped: Sequence[Visit], args: Args, kwargs: Kwargs, *, dense: bool) -> Script:
    """Return the script for inputs like those of the recording; `dense` dummies can be written to."""
    numbers = numbers_met(recorder.calls, skipped)
    replies = {(visit.path, numbers[visit.path, visit.index]): _reply(visit, recorder, dense) for visit in skipped}
    delivered = {
        source.leaf for reply in replies.values() for source in reply.stored.values() if isinstance(source, Argument)
    }
    late = {source.leaf for source in recorder.values if isinstance(source, Argument)} - delivered
    floats = {leaf: item for leaf, item in arguments(args, kwargs).items() if item.is_floating_point()}
    dummies = {leaf: None if Input(leaf) in recorder.values else dummy(item) for leaf, item in floats.items()}
    shapes = {source: value.shape for source, value in recorder.values.items()}
    cut_call = numbers[recorder.cut.path, recorder.cut.call]
    return Script(replies, cut_call, frozenset(late), dummies, shapes)


def _reply(visit: Visit, recorder: Recorder, dense: bool) -> Reply:
    stored: dict[str, Source] = {}
    passed: dict[str, str] = {}
    taken = {id(item): leaf for leaf, item in visit.taken.items()}

    def leaf(path: str, item: Tensor) -> Tensor:
        place = Output(visit.path, visit.index, path)
        if place in recorder.values:
            stored[path] = place
        elif place in recorder.arrivals:
            stored[path] = recorder.arrivals[place]
        elif id(item) in taken:
            passed[path] = taken[id(item)]
        return dummy(item, dense=dense and path not in stored and path not in passed)

    return Reply(map_tensors(leaf, visit.output), stored, passed)


@dataclass
class Stage:
    """The state of a running step, which all shells of one suffix look at.

    Attributes:
        fills: whether stored arguments are put into the caller's own tensors, for callers that go on using these.
        training: the modules to put back in train mode at the cut.
    """

    cut: Cut
    fills: bool = False
    before: bool = False
    values: Mapping[Source, Tensor] = field(default_factory=dict)
    script: Script = field(default_factory=lambda: Script({}, 0, frozenset(), {}, {}))
    counts: dict[str, int] = field(default_factory=dict)
    training: list[nn.Module] = field(default_factory=list)

    def begin(self, script: Script, values: Mapping[Source, Tensor], running: Sequence[nn.Module]) -> None:
        """A step starts: the modules that run before the cut are in eval mode until it."""
        self.script, self.values, self.before = script, values, True
        self.counts.clear()
        self.training = [module for module in running if module.training]
        for module in self.training:
            module.training = False

    def end(self) -> None:
        """The cut is reached, or the step failed before it."""
        self.before = False
        for module in self.training:
            module.training = True

    def enter(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return the arguments of the cut call with the stored values that are still missing."""
        values, late = self.values, self.script.late
        self.end()
        self.values = {}
        if not late:
            return args, kwargs
        return map_arguments(
            lambda leaf, item: self._given(item, values[Argument(leaf)]) if leaf in late else item, args, kwargs
        )

    def _given(self, item: Tensor, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value` from the cut on: the caller's own one, or the stored one."""
        if not self.fills or value.requires_grad or any(item is one for one in self.script.dummies.values()):
            return value
        item.data = value
        return item


class Shell:
    """A module's `forward`, except before the cut."""

    def __init__(self, path: str, forward: Callable[..., Any], stage: Stage, *, hollow: bool) -> None:
        """`hollow`: the module's weights are not at hand, so that its own `forward` must not run."""
        self.path, self.forward, self.stage, self.hollow = path, forward, stage, hollow

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stage = self.stage
        if stage.before:
            index = stage.counts.get(self.path, 0)
            stage.counts[self.path] = index + 1
            if self.path == stage.cut.path and index == stage.script.cut_call:
                args, kwargs = stage.enter(args, kwargs)
            else:
                reply = stage.script.replies.get((self.path, index))
                if reply is not None:
                    return reply(stage.values, args, kwargs)
        elif (self.hollow or self.path == stage.cut.path) and not before_the_cut():
            self._refuse_stand_ins(args, kwargs)
        return self.forward(*args, **kwargs)

    def _refuse_stand_ins(self, args: Args, kwargs: Kwargs) -> None:
        """After the cut, only a recomputation comes here with stand-ins: it starts anew before the cut."""
        late = self.stage.script.late
        taken = arguments(args, kwargs) if late and not self.hollow else {}
        if self.hollow or any(taken[leaf].isnan().all() for leaf in late & taken.keys()):
            raise SplitError(
                f"{self.path!r} would run again without what recycled layers gave it: gradient checkpointing "
                f"recomputes a region that holds the cut {self.stage.cut}; cut where one begins, or make it smaller"
            )
