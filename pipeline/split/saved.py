"""A proved split written down as JSON, from which its suffix is built again without running the model."""

from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.keys import JSON
from pipeline.split.cut import Argument, Cut, Input, Output, TensorSource
from pipeline.split.inputs import TensorSpec
from pipeline.split.layout import BatchLayout
from pipeline.split.plan import SplitPlan
from pipeline.split.prefix import Slot
from pipeline.split.suffix import Suffix

SOURCES: Mapping[str, type[TensorSource]] = {kind.__name__: kind for kind in (Argument, Output, Input)}


def save_split(suffix: Suffix) -> dict[str, JSON] | None:
    """Return what `load_suffix` needs beside the weights and the constants of `suffix`.

    None for a split with fake `forward`s, whose results may be any objects.
    """
    plan = suffix.plan
    if plan.fake_forwards:
        return None
    slots: list[JSON] = [
        {
            "name": slot.name,
            "source": _source_to_json(slot.source),
            "layout": [*astuple(slot.layout)],
            "dtype": str(slot.spec.dtype).removeprefix("torch."),
            "shape": [*slot.spec.shape],
        }
        for slot in suffix.slots
    ]
    return {
        "cut": [*astuple(plan.cut)],
        "slots": slots,
        "constants": [_source_to_json(source) for source in suffix.constants],
        "written": [_source_to_json(source) for source in sorted(plan.written, key=str)],
        "frozen": {**plan.frozen},
        "kept": [*plan.kept],
        "read": [*plan.read],
        "before": [*plan.before],
        "after": sorted(plan.after),
        "blocks": [*plan.blocks],
        "replay": [suffix.replay.fills, suffix.replay.dense],
    }


def load_suffix(model: nn.Module, saved: Mapping[str, Any], constants: Mapping[str, Tensor], added: set[str]) -> Suffix:
    """Return the suffix that `save_split` was given, for a `model` built the same way.

    It shares its trainable parameters with `model`, whose frozen parameters may be on the meta device but for those
    that the suffix reads. `constants` are those of the suffix, by their sources as text; `added` are modules after the
    cut that the model did not have then.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: `saved` does not describe a split of `model`.
    """
    slots = []
    for slot in saved["slots"]:
        dtype = getattr(torch, slot["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{slot['dtype']!r} is no dtype")
        layout, spec = BatchLayout(*slot["layout"]), TensorSpec(dtype, tuple(slot["shape"]))
        slots.append(Slot(slot["name"], _source_from_json(slot["source"]), layout, spec))
    plan = SplitPlan(
        Cut(*saved["cut"]),
        frozen=saved["frozen"],
        read=saved["read"],
        before=saved["before"],
        after={*saved["after"], *added},
        again=set(),
        blocks=saved["blocks"],
        kept=saved["kept"],
        written=set(map(_source_from_json, saved["written"])),
    )
    of_cut = {source: constants[str(source)] for source in map(_source_from_json, saved["constants"])}
    suffix = Suffix(model, plan, slots, of_cut, share=True)
    suffix.replay.fills, suffix.replay.dense = map(bool, saved["replay"])
    return suffix


def with_model(suffix: Suffix, model: nn.Module, added: set[str]) -> Suffix:
    """Return a suffix like `suffix` for `model`, a copy of its model in which modules `added` run after the cut."""
    plan = replace(suffix.plan, after=suffix.plan.after | added)
    changed = Suffix(model, plan, suffix.slots, suffix.constants)
    changed._dtypes = dict(suffix._dtypes)  # it may have been converted
    changed.replay.fills, changed.replay.dense = suffix.replay.fills, suffix.replay.dense
    return changed


def _source_to_json(source: TensorSource) -> list[JSON]:
    return [type(source).__name__, *astuple(source)]


def _source_from_json(saved: list[Any]) -> TensorSource:
    kind, *values = saved
    return SOURCES[kind](*values)
