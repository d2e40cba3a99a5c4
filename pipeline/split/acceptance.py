"""The proof of every split, that the suffix does what the full model does, and warnings about exact splits."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.forward import OUT_OF_MEMORY, state_kept
from pipeline.split.layout import SAMPLE_TOLERANCE, batch_size
from pipeline.split.observation import Observation, observe, run_in_training, seeded_calls
from pipeline.split.plan import Planned, SplitPlan
from pipeline.split.prefix import Slot, State
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs, difference, map_arguments, mismatch

LEFT = " on the left; pad on the right (tokenizer.padding_side), or give position_ids that count from the first token"
ALWAYS = "; pad every batch to one fixed length"


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
    """Find the kind of replay with which `suffix` does what `model` does.

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
    replay = suffix.replay
    for replay.fills, replay.dense in itertools.product((False, True), repeat=2):
        replay.forget()
        reason = next((found for run in runs if (found := _deviation(suffix, run))), None)
        suffix.train(training)
        if reason is None:
            return
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


def warn_about_shared_layers(model: nn.Module, plan: SplitPlan) -> None:
    """Warn when layers after the cut do not train, because the prefix runs the same layers (ALBERT)."""
    calls_again = set(plan.before) & plan.after
    shared = [name for name in plan.kept if name.rpartition(".")[0] in calls_again]
    if shared:
        size = sum(model.get_parameter(name).numel() for name in shared)
        rest = sum(item.numel() for name, item in model.named_parameters() if name not in plan.frozen)
        warnings.warn(
            f"split at {plan.cut}: the prefix and the suffix share layers ({shared[0]!r} and others, {size:,} "
            f"parameters); shared layers do not train, only the {rest:,} parameters of the rest of the suffix do",
            stacklevel=3,
        )


def warn_about_padding(model: nn.Module, planned: Planned, slots: Sequence[Slot], args: Args, kwargs: Kwargs) -> None:
    """Warn when the state of a padded sample changes with its padding.

    A state is stored without padding and meets other samples later, padded to another length. A network may mix the
    padding in (FNet, XLNet), or number positions from the left edge of the batch, which padding on the left moves
    (BERT). The shortest sample of the example is run again without its padding; without a padded sample there is no
    check.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    row = int(mask.sum(1).argmin())
    places = mask[row].nonzero().flatten()
    length, padded = len(places), mask.shape[1]
    if length in (0, padded) or int(places[-1] - places[0]) != length - 1:
        return
    start, batch = int(places[0]), batch_size(args, kwargs)

    def trim(_: str, item: Tensor) -> Tensor:
        item = item[[row] * batch] if item.dim() and item.shape[0] == batch else item
        return item[:, start : start + length] if item.shape[:2] == mask.shape else item

    plan, padded_run = planned.plan, planned.observation
    trimmed_run = Observation(plan.cut, plan.sources)
    observe(model, [trimmed_run], *map_arguments(trim, args, kwargs))
    for slot in slots:
        ours = slot.layout.to_state(padded_run.values[slot.source], batch)[row]
        theirs = slot.layout.to_state(trimmed_run.values[slot.source], batch)[0]
        if ours.dim() == 0 or ours.shape[0] != padded:
            continue
        if difference(ours[start : start + length], theirs) > SAMPLE_TOLERANCE:
            warnings.warn(
                f"split at {plan.cut}: state {slot.name!r} of a sample depends on how far it is padded"
                f"{LEFT if start else ALWAYS}, or what is recycled differs from what the full model computes",
                stacklevel=3,
            )
