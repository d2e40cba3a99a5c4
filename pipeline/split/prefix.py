"""The frozen part of a split: runs the full model up to the cut and returns the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.layout import Layout, batch_size
from pipeline.split.plan import Plan
from pipeline.split.record import Tap, record
from pipeline.split.sources import Source

State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """What the prefix returns under one name: dtype, and shape without the batch axis as seen on the example."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One tensor of the state: its name, where the model has it, and how its axes lie there."""

    name: str
    source: Source
    layout: Layout
    spec: TensorSpec


class Prefix:
    """The layers before the cut, as a function from inputs to state. It holds the model; it copies no weights.

    Attributes:
        cut: where the model is cut.
        spec: dtype and shape of each tensor of the state.
    """

    def __init__(self, model: nn.Module, plan: Plan, slots: Sequence[Slot]) -> None:
        """Use `split`, which finds `plan` and `slots` and proves them."""
        self.model = model
        self.cut: Cut = plan.cut
        self.slots = tuple(slots)
        self.spec: Mapping[str, TensorSpec] = {slot.name: slot.spec for slot in slots}
        self._plan = plan

    def __call__(self, *args: Any, **inputs: Any) -> State:
        """Return the state of a batch, each tensor with the batch axis first: (B, ...).

        Runs in eval mode without gradients, stops at the cut, and gives the modules their train or eval flags back. At
        the cut 0 the state holds the floating-point inputs themselves, not copies.

        Raises:
            SplitError: these inputs do not lead to the cut.
        """
        tap = self.tap()
        record(self.model, [tap], args, inputs)
        return self.collect(tap, batch_size(args, inputs))

    def weights(self) -> dict[str, Tensor]:
        """Return every parameter and buffer that is read before the cut, by its name in the full model, sorted."""
        held: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        held |= dict(self.model.named_buffers(remove_duplicate=False))
        return {name: held[name].detach() for name in self._plan.read}

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that are called before the cut, in the order of their first call, with their paths."""
        modules = dict(self.model.named_modules())
        return [(path, modules[path]) for path in self._plan.before]

    def tap(self) -> Tap:
        """Return the request for this prefix's state, to be filled by a run of the model."""
        return Tap(self.cut, [slot.source for slot in self.slots])

    def collect(self, tap: Tap, batch: int) -> State:
        """Return the state of `batch` samples from a filled tap."""
        return {slot.name: slot.layout.state(_taken(tap, slot), batch) for slot in self.slots}


def _taken(tap: Tap, slot: Slot) -> Tensor:
    if slot.source not in tap.values:
        raise SplitError(
            f"state {slot.name!r} is not made with these inputs; give the prefix inputs like the example's"
        )
    return tap.values[slot.source]


class Capture:
    """One forward pass for several cuts of one model; see `capture`.

    Attributes:
        elapsed: seconds from the start of the last call to each cut, in the order of the prefixes.
    """

    def __init__(self, prefixes: Sequence[Prefix]) -> None:
        self.prefixes = tuple(prefixes)
        self.elapsed: list[float] = []

    def __call__(self, *args: Any, **inputs: Any) -> list[State]:
        """Return the state of a batch at each cut, in the order of the prefixes; stops at the deepest."""
        taps = [prefix.tap() for prefix in self.prefixes]
        record(self.prefixes[0].model, taps, args, inputs)
        self.elapsed = [tap.elapsed for tap in taps]
        batch = batch_size(args, inputs)
        return [prefix.collect(tap, batch) for prefix, tap in zip(self.prefixes, taps, strict=True)]


def capture(prefixes: Sequence[Prefix]) -> Capture:
    """Return a function that runs the common model of `prefixes` once and returns their states.

    Raises:
        SplitError: there is no prefix, or they belong to different models.
    """
    if not prefixes or any(prefix.model is not prefixes[0].model for prefix in prefixes):
        raise SplitError(
            "capture takes one or more prefixes of one and the same model object; split that object for each cut"
        )
    return Capture(prefixes)
