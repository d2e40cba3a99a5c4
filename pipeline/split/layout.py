"""The batch axis of what crosses a cut, proved by two batches.

A state keeps samples apart, so the batch axis of each of its tensors must be known: first in the state, and wherever
the model has it in the value. Two batches of different size show it as the one axis that changes; if its size is a
multiple of the batch (windows, flattened tokens), it holds the samples' rows one sample after the other. The second
batch also holds the samples in another order, which proves that a sample's value does not depend on its companions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import SplitError
from pipeline.split.tree import Args, Kwargs, arguments, map_arguments

SAMPLE_TOLERANCE = 1e-3  # kernels round differently for batches of another size


@dataclass(frozen=True)
class Layout:
    """Where a value has its batch axis, and whether that axis also holds each sample's rows."""

    axis: int
    folded: bool

    def state(self, value: Tensor, batch: int) -> Tensor:
        """Return `value` with the batch axis first and alone: (B, ...)."""
        first = value.movedim(self.axis, 0)
        return first.reshape(batch, -1, *first.shape[1:]) if self.folded else first

    def value(self, state: Tensor) -> Tensor:
        """Undo `state`."""
        rows = state.flatten(0, 1) if self.folded else state
        return rows.movedim(0, self.axis) if self.axis else rows


def batch_size(args: Args, kwargs: Kwargs) -> int:
    """Return the size of the first axis of the first tensor among the inputs.

    Raises:
        SplitError: the inputs hold no tensor with axes.
    """
    size = next((item.shape[0] for item in arguments(args, kwargs).values() if item.dim()), None)
    if size is None:
        raise SplitError(
            "the inputs hold no tensor with a batch axis; give a batch of at least 2 samples, batch axis first"
        )
    return size


def two_samples(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Return the batch of the two samples with the most and the fewest non-zeros among their integers and flags.

    Of padded texts these are the longest and the shortest; of other inputs any two show the same.
    """
    batch = batch_size(args, kwargs)
    filled = torch.zeros(batch)
    for item in arguments(args, kwargs).values():
        if item.dim() and item.shape[0] == batch and not item.is_floating_point():
            filled += item.reshape(batch, -1).count_nonzero(1).cpu()
    rows = (
        torch.tensor([int(filled.argmax()), int(filled.argmin())])
        if bool((filled != filled[0]).any())
        else torch.arange(2)
    )
    return _rows(args, kwargs, rows)


def regroup(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, Tensor]:
    """Return a batch of one sample more, in another order, and the row of the first batch that each of its rows is."""
    rows = torch.tensor([*reversed(range(batch_size(args, kwargs))), 0])
    return *_rows(args, kwargs, rows), rows


def _rows(args: Args, kwargs: Kwargs, rows: Tensor) -> tuple[Args, Kwargs]:
    batch = batch_size(args, kwargs)

    def take(_: str, item: Tensor) -> Tensor:
        return item[rows.to(item.device)] if item.dim() and item.shape[0] == batch else item

    return map_arguments(take, args, kwargs)


def prove_layout(name: str, first: Tensor, second: Tensor, rows: Tensor) -> Layout | None:
    """Return the layout of a value seen in a batch and in its regrouping; None for a constant of the model.

    Raises:
        SplitError: no single axis follows the batch, or a sample's value depends on the other samples.
    """
    if first.dim() != second.dim() or first.dtype != second.dtype:
        raise SplitError(f"state {name!r} has another rank or dtype in a batch of another size; cut elsewhere")
    axes = [axis for axis in range(first.dim()) if first.shape[axis] != second.shape[axis]]
    if not axes:
        if not torch.equal(first, second):
            raise SplitError(f"state {name!r} has no batch axis, yet differs between batches; cut elsewhere")
        return None
    before, after = int(rows.max()) + 1, len(rows)
    sizes = first.shape[axes[0]], second.shape[axes[0]]
    if len(axes) > 1 or sizes[0] * after != sizes[1] * before or sizes[0] % before:
        raise SplitError(
            f"state {name!r} is {tuple(first.shape)} for {before} samples and {tuple(second.shape)} for {after}: "
            "no single axis is the batch; cut elsewhere"
        )
    layout = Layout(axes[0], folded=sizes[0] != before)
    ours, theirs = layout.state(first, before)[rows.to(first.device)], layout.state(second, after)
    if difference(ours, theirs) > SAMPLE_TOLERANCE:
        raise SplitError(
            f"state {name!r} of a sample depends on the other samples of its batch; cut before they are mixed"
        )
    return layout


def difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest absolute difference relative to the largest finite magnitude of `expected`.

    It is infinite where shapes, non-finite values or integers differ.
    """
    if expected.shape != found.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    if not expected.numel():
        return 0.0
    ours, theirs = expected.double(), found.double()
    finite = ours.isfinite()
    if not torch.equal(ours[~finite].nan_to_num(nan=0.5), theirs[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    scale = ours[finite].abs().amax() if finite.any() else ours.new_ones(())
    gap: Any = (ours - theirs)[finite].abs().amax() if finite.any() else ours.new_zeros(())
    return float(gap / scale.clamp_min(1e-30)) if float(gap) else 0.0
