"""The batch axis of each tensor that crosses a cut, proved by two batches.

A state keeps samples apart, so the batch axis of each of its tensors must be known. It comes first in the state, and
anywhere in the model's own tensor. Two batches of different size show it as the one axis that changes; if its size is a
multiple of the batch (windows, flattened tokens), it holds the samples' rows one sample after the other. The second
batch holds the samples in another order, which proves that a sample's value does not depend on the rest of its batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import SplitError
from pipeline.split.tree import Args, Kwargs, arguments, difference, map_arguments, tolerance


@dataclass(frozen=True)
class BatchLayout:
    """The batch axis of a tensor of the model; `folded` if it has several rows per sample, sample by sample."""

    axis: int
    folded: bool

    def to_state(self, value: Tensor, batch: int) -> Tensor:
        """Return a tensor of the model as the state holds it, (B, ...)."""
        first = value.movedim(self.axis, 0)
        return first.reshape(batch, -1, *first.shape[1:]) if self.folded else first

    def from_state(self, state: Tensor) -> Tensor:
        """Return a tensor of the state, (B, ...), as the model has it."""
        rows = state.flatten(0, 1) if self.folded else state
        return rows.movedim(0, self.axis) if self.axis else rows


def batch_size(args: Args, kwargs: Kwargs) -> int:
    """Return the size of the first axis of the first tensor among the inputs."""
    size = next((item.shape[0] for item in arguments(args, kwargs).values() if item.dim()), None)
    if size is None:
        raise SplitError(
            "the inputs hold no tensor with a batch axis; give a batch of at least 2 samples, batch axis first"
        )
    return size


def two_samples(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Return a batch of two samples: those with the most and the fewest non-zeros among their integers and flags.

    Of padded texts these are the longest and the shortest; of other inputs the first two.
    """
    batch = batch_size(args, kwargs)
    filled = torch.zeros(batch)
    for item in arguments(args, kwargs).values():
        if item.dim() and item.shape[0] == batch and not item.is_floating_point():
            filled += item.reshape(batch, -1).count_nonzero(1).cpu()
    rows = [int(filled.argmax()), int(filled.argmin())] if bool((filled != filled[0]).any()) else [0, 1]
    return _rows(args, kwargs, torch.tensor(rows))


def regroup(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, Tensor]:
    """Return a batch of the same samples in another order, one of them twice, and the former row of each row."""
    rows = torch.tensor([*reversed(range(batch_size(args, kwargs))), 0])
    return *_rows(args, kwargs, rows), rows


def sample_tolerance(dtype: torch.dtype) -> float:
    """Return the bound on relative differences of a sample between batches of two sizes: kernels round differently."""
    return max(1e-3, 2 * tolerance(dtype))


def _rows(args: Args, kwargs: Kwargs, rows: Tensor) -> tuple[Args, Kwargs]:
    batch = batch_size(args, kwargs)

    def take(_: str, item: Tensor) -> Tensor:
        return item[rows.to(item.device)] if item.dim() and item.shape[0] == batch else item

    return map_arguments(take, args, kwargs)


def prove_layout(name: str, first: Tensor, second: Tensor, rows: Tensor) -> BatchLayout | None:
    """Return the layout of a value seen in a batch and in its regrouping; None for a constant of the model.

    Where no single axis follows the batch, or a sample's value depends on other samples, SplitError says so.
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
    layout = BatchLayout(axes[0], folded=sizes[0] != before)
    ours, theirs = layout.to_state(first, before)[rows.to(first.device)], layout.to_state(second, after)
    if difference(ours, theirs) > sample_tolerance(ours.dtype):
        raise SplitError(
            f"state {name!r} of a sample depends on the other samples of its batch; cut before they are mixed"
        )
    return layout
