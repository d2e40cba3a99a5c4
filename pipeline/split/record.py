"""Running the full model up to one or several cuts, and taking what crosses them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.modes import accelerator_kind, eval_run
from pipeline.split.sources import Argument, Input, Output, Source
from pipeline.split.tree import Args, Kwargs, arguments, tensors


@dataclass
class Tap:
    """What to take at one cut, and what the last run took there.

    Attributes:
        values: every tensor argument of the cut call, and the `wanted` outputs and inputs.
        elapsed: seconds from the start of the run to the cut.
    """

    cut: Cut
    wanted: Collection[Source]
    values: dict[Source, Tensor] = field(default_factory=dict)
    elapsed: float = 0.0


class _DeepestCut(BaseException):
    """Ends a run at the deepest cut; no `except Exception` in a model's code stops it."""


def record(model: nn.Module, taps: Sequence[Tap], args: Args, kwargs: Kwargs, *, to_the_end: bool = False) -> Any:
    """Run `model` in eval mode without gradients, fill the taps, and stop at the last of them to be reached.

    Where the model runs on, because of further taps or `to_the_end`, values are copies, for it may write into them.
    Returns the model's output `to_the_end`, else None.

    Raises:
        InputRefusedError: the model's own code fails on these inputs.
        SplitError: a cut was not reached with these inputs.
    """
    output = None
    with eval_run(model, args, kwargs):
        run = _Run(model, taps, args, kwargs, to_the_end=to_the_end)
        try:
            output = model(*args, **kwargs)
        except _DeepestCut:
            return None
        finally:
            run.end()
    if run.pending:
        raise SplitError(
            f"the cut {run.pending[0].cut} was not reached with these inputs; the model took another path than on the "
            "example"
        )
    return output


class _Run:
    def __init__(self, model: nn.Module, taps: Sequence[Tap], args: Args, kwargs: Kwargs, *, to_the_end: bool) -> None:
        self.pending = list(taps)
        self.to_the_end = to_the_end
        self.inputs = arguments(args, kwargs)
        self.counts: dict[tuple[str, str], int] = {}
        self.handles: list[Any] = []
        for tap in taps:
            tap.values = {source: self.inputs[source.leaf] for source in tap.wanted if isinstance(source, Input)}
        modules = dict(model.named_modules())
        for path in {source.path for tap in taps for source in tap.wanted if isinstance(source, Output)}:
            self.handles.append(modules[path].register_forward_hook(self._left(path)))
        for path in {tap.cut.path for tap in taps}:
            self.handles.append(modules[path].register_forward_pre_hook(self._entered(path), with_kwargs=True))
        self.start = time.perf_counter()

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, event: str, path: str) -> int:
        number = self.counts.get((event, path), 0)
        self.counts[event, path] = number + 1
        return number

    def _left(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = self._count("left", path)
            found = {Output(path, call, leaf): tensor for leaf, tensor in tensors(output).items()}
            for tap in self.pending:
                tap.values |= {source: found[source].detach().clone() for source in tap.wanted if source in found}

        return hook

    def _entered(self, path: str) -> Any:
        def hook(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            call = self._count("entered", path)
            reached = [tap for tap in self.pending if (tap.cut.path, tap.cut.call) == (path, call)]
            for tap in reached:
                self.pending.remove(tap)
                self._take(tap, args, kwargs)
            if reached and not self.pending and not self.to_the_end:
                raise _DeepestCut

        return hook

    def _take(self, tap: Tap, args: Args, kwargs: Kwargs) -> None:
        for leaf, tensor in arguments(args, kwargs).items():
            value = tensor.detach()
            goes_on = self.to_the_end or self.pending
            tap.values[Argument(leaf)] = value.clone() if goes_on and Argument(leaf) in tap.wanted else value
        for device in {tensor.device for tensor in tap.values.values()} - {torch.device("cpu")}:
            if device.type == accelerator_kind():  # its operations may still be running
                torch.accelerator.synchronize(device)
        tap.elapsed = time.perf_counter() - self.start
