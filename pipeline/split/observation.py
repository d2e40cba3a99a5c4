"""Runs of the full model: up to one or several cuts, to take the tensors that cross them, and in training."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.cut import Argument, Cut, Input, Output, TensorSource
from pipeline.split.forward import Timer, errors_as_refusals, eval_run, observed_calls, random_state_kept
from pipeline.split.splittable import copy_of
from pipeline.split.tree import Args, Kwargs, arguments, map_tensors, tensors


@dataclass
class Observation:
    """What to take at one cut, and what the last run took there.

    Attributes:
        wanted: outputs and inputs to take besides the arguments of the cut call.
        values: every tensor argument of the cut call, and what is `wanted`.
        elapsed: returns the seconds from the start of the run to the cut; an accelerator may still be under way.
    """

    cut: Cut
    wanted: Collection[TensorSource]
    values: dict[TensorSource, Tensor] = field(default_factory=dict)
    elapsed: Callable[[], float] = float


class _LastCutReached(BaseException):
    """Ends a run at its last cut; not an Exception, so that no `except` in a model's code stops it."""


def observe(
    model: nn.Module, observations: Sequence[Observation], args: Args, kwargs: Kwargs, *, to_the_end: bool = False
) -> Any:
    """Run `model` in eval mode without gradients, fill `observations`, and stop at the last cut that is reached.

    Where the model runs on, because of further cuts or `to_the_end`, values are copies, for it may write into them.
    Returns the model's output `to_the_end`, else None.

    Raises:
        InputRefusedError: the model's own code fails on these inputs.
        SplitError: a cut is not reached with these inputs.
    """
    inputs = arguments(args, kwargs)
    for one in observations:
        one.values = {source: inputs[source.leaf] for source in one.wanted if isinstance(source, Input)}
    pending = list(observations)

    def on_return(path: str, index: int, args: Args, kwargs: Kwargs, output: Any) -> None:
        found = {Output(path, index, leaf): tensor for leaf, tensor in tensors(output).items()}
        for one in pending:
            one.values |= {source: found[source].detach().clone() for source in one.wanted if source in found}

    def on_call(path: str, index: int, args: Args, kwargs: Kwargs) -> None:
        for one in [one for one in pending if (one.cut.path, one.cut.call) == (path, index)]:
            pending.remove(one)
            for leaf, tensor in arguments(args, kwargs).items():
                is_copied = Argument(leaf) in one.wanted and (to_the_end or pending)
                one.values[Argument(leaf)] = tensor.detach().clone() if is_copied else tensor.detach()
            one.elapsed = timer.lap()
            if not pending and not to_the_end:
                raise _LastCutReached

    outputs = {source.path for one in observations for source in one.wanted if isinstance(source, Output)}
    paths = outputs | {one.cut.path for one in observations}
    with suppress(_LastCutReached), observed_calls(model, on_call, on_return, paths), eval_run(model, args, kwargs):
        timer = Timer(next((tensor.device for tensor in inputs.values()), torch.device("cpu")))
        output = model(*args, **kwargs)
        if pending:
            raise SplitError(
                f"the cut {pending[0].cut} was not reached with these inputs; the model took another path than on the "
                "example"
            )
        return output
    return None


def run_in_training(model: nn.Module, cut: Cut, args: Args, kwargs: Kwargs) -> tuple[Any, dict[str, Tensor]]:
    """Run a copy of `model`, with random numbers as in `seeded_calls`; return its output and its buffers after it."""
    root = copy_of(model, {id(item): item for item in model.parameters()}).train()
    flags = [(module, module.training) for module in root.modules()]
    with_gradients = torch.is_grad_enabled()

    def on_call(path: str, index: int, args: Args, kwargs: Kwargs) -> None:
        if index == cut.call:
            torch.set_grad_enabled(with_gradients)
            for module, training in flags:
                module.training = training

    for module in root.modules():
        module.training = False
    with (
        random_state_kept(root),
        torch.no_grad(),
        errors_as_refusals(model, args, kwargs, "train"),
        observed_calls(root, on_call, paths={cut.path}),
        seeded_calls(root, cut),
    ):
        output = root(*args, **kwargs)
    return map_tensors(lambda _, item: item.detach(), output), dict(root.named_buffers())


def seeded_calls(root: nn.Module, cut: Cut) -> AbstractContextManager[None]:
    """Set the random seed at every call of the cut module: what is drawn later does not depend on what runs before."""

    def on_call(*_: Any) -> None:
        torch.manual_seed(0)

    return observed_calls(root, on_call, paths={cut.path})
