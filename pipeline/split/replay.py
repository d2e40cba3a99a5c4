"""One run of the suffix: the model's own `forward`, on phantoms until the cut and on real tensors after it.

On entry to the cut call, phantom arguments take their stored values, or are recomputed from how they were made;
outputs of earlier calls that the state holds take theirs when the call returns. From then on a phantom that an
operation touches is *forced*: its value is computed from what is at hand. A value that cannot be had ends the run;
while a plan is made, that is how what must be stored is discovered (see `planner`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.operations import imagine, needs_values, with_integer_indices
from pipeline.split.phantom import Phantom, Step, interpreting, phantoms
from pipeline.split.sources import Argument, Input, Output, Source, unfit
from pipeline.split.tree import Args, Kwargs, map_arguments, map_tensors, tensors


class Replay:
    """One run of `root`, whose frozen parameters are phantoms, from stored `values` on."""

    def __init__(self, root: nn.Module, cut: Cut, values: Mapping[Source, Tensor]) -> None:
        self.root = root
        self.cut = cut
        self.values = values
        self.entered = False
        self._modes = [(module, module.training) for module in root.modules()]
        self._counts: dict[tuple[str, str], int] = {}

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        """Return the model's output.

        Raises:
            SplitError: the cut is not reached, or a value is needed that is neither stored nor recomputable.
        """
        args, kwargs = map_arguments(self._input, args, kwargs)
        handles = self._hooks()
        self.root.eval()
        try:
            with interpreting(self):
                output = self.root(*args, **kwargs)
                if not self.entered:
                    raise SplitError(
                        f"the cut {self.cut} was not reached with these inputs; give inputs like the example's"
                    )
                return map_tensors(lambda _, item: self.force(item), output)
        finally:
            self._restore_modes()
            for handle in handles:
                handle.remove()

    def operate(self, function: Any, args: Args, kwargs: Kwargs) -> Any:
        """Carry out an operation that some phantom takes part in."""
        function, args = with_integer_indices(function, args)
        if not self.entered and not needs_values(function, args):
            return imagine(function, args, kwargs)
        if not self.entered:
            self.want_value(function, phantoms(args, kwargs))
        args, kwargs = map_arguments(lambda _, item: self.force(item), args, kwargs)
        return function(*args, **kwargs)

    def read(self, reader: object, phantom: Phantom) -> Tensor:
        """Return the value of a phantom that goes out of torch's hands: to lists, to numpy."""
        if not self.entered:
            self.want_value(reader, [phantom])
        return self.force(phantom)

    def want_value(self, function: object, needed: list[Phantom]) -> None:
        """`function` depends on values before the cut; refuse unless they can be recomputed."""
        for phantom in needed:
            if not is_available(phantom):
                raise SplitError(
                    f"before the cut {self.cut}, {function} depends on the values of a recycled layer; cut earlier"
                )

    def force(self, item: Tensor) -> Tensor:
        """Return the value of a phantom, and any other tensor itself."""
        if not isinstance(item, Phantom):
            return item
        if item.value is None and not is_available(item):
            self.lack(item)
        return compute(item)

    def lack(self, phantom: Phantom) -> None:
        """The value of `phantom` is neither stored nor recomputable."""
        raise SplitError(
            f"after the cut {self.cut} the model reads a value of a recycled layer (shape {tuple(phantom.shape)}) "
            "that it did not read on the example; split with an example of this kind"
        )

    def enter(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The cut is reached: give the stored arguments their values, and the modules their own train or eval flags."""

        def arrive(leaf: str, item: Tensor) -> Tensor:
            if isinstance(item, Phantom) and Argument(leaf) in self.values:
                self.assign(item, Argument(leaf))
            return item

        map_arguments(arrive, args, kwargs)
        self.entered = True
        self._restore_modes()
        return map_arguments(lambda _, item: self.force(item), args, kwargs)

    def assign(self, phantom: Phantom, source: Source) -> None:
        """Give `phantom` its stored value.

        Raises:
            SplitError: the stored value has another shape than the model expects with these inputs.
        """
        value = self.values[source]
        if value.shape != phantom.shape:
            raise unfit(source, value.shape, phantom.shape)
        phantom.value = value

    def output_paths(self) -> set[str]:
        """Return the modules whose outputs are looked at before the cut."""
        return {source.path for source in self.values if isinstance(source, Output)}

    def leave(self, path: str, call: int, args: Args, kwargs: Kwargs, output: Any) -> None:
        """Call number `call` of module `path` returned, before the cut."""
        for leaf, item in tensors(output).items():
            source = Output(path, call, leaf)
            if source in self.values and isinstance(item, Phantom):
                self.assign(item, source)

    def _input(self, leaf: str, item: Tensor) -> Tensor:
        if not item.is_floating_point():
            return item
        phantom = Phantom.like(item, Input(leaf))
        phantom.value = self.values.get(Input(leaf))
        return phantom

    def _hooks(self) -> list[Any]:
        modules = dict(self.root.named_modules())

        def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
            at_cut = not self.entered and self._count("enter", self.cut.path) == self.cut.call
            return self.enter(args, kwargs) if at_cut else None

        def leave(path: str) -> Any:
            def hook(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
                if not self.entered:
                    self.leave(path, self._count("leave", path), args, kwargs, output)

            return hook

        handles: list[Any] = [modules[self.cut.path].register_forward_pre_hook(enter, with_kwargs=True)]
        handles += [modules[path].register_forward_hook(leave(path), with_kwargs=True) for path in self.output_paths()]
        return handles

    def _count(self, event: str, path: str) -> int:
        number = self._counts.get((event, path), 0)
        self._counts[event, path] = number + 1
        return number

    def _restore_modes(self) -> None:
        for module, training in self._modes:
            module.training = training


def ancestry(phantom: Phantom) -> list[Phantom]:
    """Return the phantoms without a value that `phantom` is made from, itself included, nearest first."""
    found: dict[int, Phantom] = {}
    pending = [phantom]
    while pending:
        item = pending.pop(0)
        if item.value is None and id(item) not in found:
            found[id(item)] = item
            if isinstance(item.origin, Step):
                pending += item.origin.parents()
    return list(found.values())


def is_available(phantom: Phantom) -> bool:
    """Tell whether the value is known, or can be computed from known ones."""
    return all(isinstance(item.origin, Step) for item in ancestry(phantom))


def compute(phantom: Phantom) -> Tensor:
    """Return the value of a phantom that is available, computing and noting those of its ancestors."""
    pending = [phantom]
    while pending:
        item = pending[-1]
        step = item.origin
        if item.value is None and isinstance(step, Step):
            missing = [parent for parent in step.parents() if parent.value is None]
            if missing:
                pending += missing
                continue
            item.value = step.result()
        pending.pop()
    if phantom.value is None:
        raise SplitError("a value of a recycled layer is not available")  # callers ask `is_available` first
    return phantom.value
