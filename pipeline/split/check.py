"""The proof that every split gives: the suffix returns what the full model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.layout import difference
from pipeline.split.modes import eval_mode
from pipeline.split.prefix import State
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs, tensors

TOLERANCE = 1e-6  # relative to the largest magnitude of each output tensor, in float32


def check_repeatable(name: str, first: Tensor, again: Tensor) -> None:
    """Refuse a prefix that is random in eval mode: its state would be one draw, stored for ever.

    Raises:
        SplitError: two runs on the same batch differ.
    """
    if difference(first, again) > tolerance(first.dtype):
        raise SplitError(
            f"the prefix is random in eval mode: state {name!r} differs between two runs on the same batch"
        )


def check_outputs(cut: Cut, expected: Any, found: Any) -> None:
    """Compare the output of the suffix with that of the full model on one batch, both in eval mode.

    Raises:
        SplitError: an output tensor is missing or differs by more than rounding.
    """
    wanted, got = tensors(expected), tensors(found)
    if wanted.keys() != got.keys():
        raise SplitError(f"split at {cut}: the model returns {sorted(wanted)}, the suffix {sorted(got)}; cut elsewhere")
    for leaf, tensor in wanted.items():
        gap, bound = difference(tensor, got[leaf]), tolerance(tensor.dtype)
        if gap > bound:
            raise SplitError(
                f"split at {cut}: output {leaf or 'tensor'!r} differs from the full model's by {gap:.1e} "
                f"(relative; bound {bound:.0e}) in eval mode; the model is random there, or cannot be cut here"
            )


def output_in_eval(suffix: Suffix, state: State, args: Args, kwargs: Kwargs) -> Any:
    """Return the output of `suffix` in eval mode, without gradients; every module gets its own flag back."""
    with torch.no_grad(), eval_mode(suffix), eval_mode(suffix.root):
        return suffix(state, *args, **kwargs)


def tolerance(dtype: torch.dtype) -> float:
    """Return the bound on relative differences between two runs of the same operations in `dtype`."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps) if dtype.itemsize < 4 and dtype.is_floating_point else TOLERANCE
