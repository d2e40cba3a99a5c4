"""Warnings about splits that are exact on the example, and yet may not be what the user wants."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.split.comparison import difference
from pipeline.split.layout import SAMPLE_TOLERANCE, batch_size
from pipeline.split.observation import Observation, observe
from pipeline.split.plan import SplitPlan
from pipeline.split.planner import Planned
from pipeline.split.prefix import Slot
from pipeline.split.tree import Args, Kwargs, map_arguments

MASK = "attention_mask"
ALWAYS = "; pad every batch to one fixed length"
LEFT = " on the left; pad on the right (tokenizer.padding_side), or give position_ids that count from the first token"


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
    mask = kwargs.get(MASK)
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
