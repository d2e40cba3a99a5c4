"""The proof of every split: the suffix is compared with the full model, in eval and in train mode."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.comparison import mismatch
from pipeline.split.modes import OUT_OF_MEMORY, state_kept
from pipeline.split.plan import SplitPlan
from pipeline.split.prefix import State
from pipeline.split.reference import run_in_training, seeded_calls
from pipeline.split.replay import Replay
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs


@dataclass(frozen=True)
class ReferenceRun:
    """A batch with its state, and what the full model returns for it.

    Attributes:
        buffers: the buffers that the full model leaves after the run, as far as they are compared.
        training: whether the full model ran in train mode from the cut on.
    """

    args: Args
    kwargs: Kwargs
    state: State
    output: Any
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    training: bool = False


def accept(suffix: Suffix, model: nn.Module, plan: SplitPlan, runs: Sequence[ReferenceRun]) -> None:
    """Give `suffix` a replay with which it does what `model` does.

    It must return what the full model returned in each of the `runs` in eval mode and in a further one in train mode,
    where it must also leave the same buffers (running statistics). Stored tensors must be left as they are. The kinds
    of replay are tried from the cheapest to the most general.

    Raises:
        SplitError: none does; the message says what differs.
    """
    first, training = runs[0], suffix.training
    output, buffers = run_in_training(model, plan.cut, first.args, first.kwargs)
    frozen = tuple(f"{path}." for path in set(plan.before) - plan.after)
    buffers = {name: item for name, item in buffers.items() if not name.startswith(frozen)}
    runs = [*runs, ReferenceRun(first.args, first.kwargs, first.state, output, buffers, training=True)]
    for fills, dense in itertools.product((False, True), repeat=2):
        suffix.replay = Replay(suffix.root, suffix.cut, suffix.frozen, dense=dense, fills=fills)
        reason = next((found for run in runs if (found := _deviation(suffix, run))), None)
        suffix.train(training)
        if reason is None:
            return
        suffix.replay.remove()
    raise SplitError(
        f"split at {suffix.cut}: the suffix does not reproduce the full model: {reason}; the model's code before the "
        "cut depends on values or objects of recycled layers, so cut elsewhere, or give other options"
    )


def _deviation(suffix: Suffix, run: ReferenceRun) -> str | None:
    """Return how the suffix differs from the full model, or None."""
    stored = {name: tensor.clone() for name, tensor in run.state.items()} | suffix.constants
    before = {name: tensor.clone() for name, tensor in stored.items()}
    with_gradients = run.training and torch.is_grad_enabled()
    suffix.train(run.training)
    try:
        with state_kept(suffix.root), seeded_calls(suffix.root, suffix.cut), torch.set_grad_enabled(with_gradients):
            output = suffix({name: stored[name] for name in run.state}, *run.args, **run.kwargs)
            reason = mismatch(run.output, output)
            left = dict(suffix.root.named_buffers())
            changed = [name for name, item in run.buffers.items() if mismatch(item, left.get(name))]
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # the model's own code meets dummies, and may raise anything
        return f"{type(error).__name__}: {error}"
    if not reason and changed:
        reason = f"buffer {changed[0]!r} differs from the full model's"
    if not reason and any(not torch.equal(tensor, before[name]) for name, tensor in stored.items()):
        reason = "a stored tensor is written to"
    return f"{reason} in {'train' if run.training else 'eval'} mode" if reason else None
