"""Which calls before the cut need not run: found by recording one replay on phantoms.

The recording is the tree of module calls before the cut. A whole call can be skipped when all it returns are phantoms
(nobody reads their values) or its own arguments, and nothing that is stored or read is made inside. What is left runs
as it is: the callers of the cut, and whatever makes a value that is read, such as an attention mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.split.blocks import Cut
from pipeline.split.phantom import Phantom, Step
from pipeline.split.replay import Replay, ancestry
from pipeline.split.sources import Argument, Output, Source
from pipeline.split.tree import Args, Kwargs, arguments, is_plain, tensors


@dataclass(eq=False)
class Visit:
    """One call of a module before the cut.

    Attributes:
        taken: the tensors among its arguments.
        returned: whether it returned before the cut; its callers are those that did not.
        read: whether a value made in it, outside its children, was computed after all.
    """

    path: str
    index: int
    taken: dict[str, Tensor]
    children: list[Visit] = field(default_factory=list)
    output: Any = None
    returned: bool = False
    read: bool = False

    def inside(self) -> Iterator[Visit]:
        """Yield the calls made within this one, at any depth."""
        for child in self.children:
            yield child
            yield from child.inside()


class _CutReached(BaseException):
    """Ends a recording at the cut; no `except Exception` in a model's code stops it."""


class Recorder(Replay):
    """A replay that keeps the tree of calls before the cut.

    Attributes:
        calls: the root of the tree, holding the model's own call.
        arrivals: (path, index, leaf) of the call whose output arrives at the cut -> the argument as which it is stored.
    """

    def __init__(self, root: nn.Module, cut: Cut, values: Mapping[Source, Tensor]) -> None:
        super().__init__(root, cut, values)
        self.calls = Visit("", -1, {})
        self.arrivals: dict[Output, Argument] = {}
        self._stops = False
        self._open = [self.calls]
        self._makers: dict[int, tuple[Visit, Step]] = {}
        self._producers: dict[int, tuple[Output, Phantom, object]] = {}
        self._paths = {id(module): path for path, module in root.named_modules()}

    def run_to_cut(self, args: Args, kwargs: Kwargs) -> None:
        """Record without running what comes after the cut; which values it reads is then not seen."""
        self._stops = True
        with contextlib.suppress(_CutReached):
            self.run(args, kwargs)

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        handles = [module.register_forward_pre_hook(self._visit, with_kwargs=True) for module in self.root.modules()]
        try:
            return super().run(args, kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def output_paths(self) -> set[str]:
        return set(self._paths.values())

    def leave(self, path: str, call: int, args: Args, kwargs: Kwargs, output: Any) -> None:
        super().leave(path, call, args, kwargs, output)
        visit = self._open.pop()
        visit.output, visit.returned = output, True
        taken = {id(item) for item in visit.taken.values()}
        for leaf, item in tensors(output).items():
            handed_on = id(item) in taken and id(item) in self._producers
            if isinstance(item, Phantom) and not handed_on:
                self._producers[id(item)] = (Output(path, visit.index, leaf), item, item.origin)

    def operate(self, function: Any, args: Args, kwargs: Kwargs) -> Any:
        result = super().operate(function, args, kwargs)
        for item in tensors(result).values():
            if isinstance(item, Phantom) and isinstance(item.origin, Step):
                self._makers[id(item.origin)] = (self._open[-1], item.origin)
        return result

    def force(self, item: Tensor) -> Tensor:
        if isinstance(item, Phantom):
            for made in ancestry(item):
                if id(made.origin) in self._makers:
                    self._makers[id(made.origin)][0].read = True
        return super().force(item)

    def enter(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        for leaf, item in arguments(args, kwargs).items():
            if Argument(leaf) in self.values and id(item) in self._producers:
                output, phantom, origin = self._producers[id(item)]
                if phantom.origin is origin:  # not changed in place since
                    self.arrivals[output] = Argument(leaf)
        entered = super().enter(args, kwargs)
        if self._stops:
            raise _CutReached
        return entered

    def _visit(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if not self.entered:
            path = self._paths[id(module)]
            visit = Visit(path, self._count("visit", path), arguments(args, kwargs))
            self._open[-1].children.append(visit)
            self._open.append(visit)


def skippable_calls(recorder: Recorder, among: set[tuple[str, int]] | None = None) -> tuple[list[Visit], set[str]]:
    """Return the outermost calls that can be skipped, and the paths of the modules that run all the same.

    `among`: the calls to choose from, by path and number, as an earlier recording found them; all if not given.
    """
    stored = {(source.path, source.call) for source in recorder.values if isinstance(source, Output)}
    skipped: list[Visit] = []
    opened: set[str] = set()
    pending = list(recorder.calls.children)
    while pending:
        visit = pending.pop()
        if (among is None or (visit.path, visit.index) in among) and _is_skippable(visit, stored):
            skipped.append(visit)
        else:
            opened.add(visit.path)
            pending += visit.children
    return skipped, opened


def numbers_met(calls: Visit, skipped: Sequence[Visit]) -> dict[tuple[str, int], int]:
    """Return how calls are numbered once those inside `skipped` calls do not come: (path, number) -> number left."""
    closed = {id(visit) for visit in skipped}
    numbers: dict[tuple[str, int], int] = {}
    counts: dict[str, int] = {}
    pending = list(reversed(calls.children))
    while pending:
        visit = pending.pop()
        numbers[visit.path, visit.index] = counts.get(visit.path, 0)
        counts[visit.path] = numbers[visit.path, visit.index] + 1
        if id(visit) not in closed:
            pending += reversed(visit.children)
    return numbers


def _is_skippable(visit: Visit, stored: set[tuple[str, int]]) -> bool:
    if not visit.returned or visit.read:
        return False
    if any(inner.read or (inner.path, inner.index) in stored for inner in visit.inside()):
        return False
    taken = {id(item) for item in visit.taken.values()}
    made = tensors(visit.output).values()
    return (
        is_plain(visit.output)
        and any(isinstance(item, Phantom) for item in made)
        and all(isinstance(item, Phantom) or id(item) in taken for item in made)
    )
