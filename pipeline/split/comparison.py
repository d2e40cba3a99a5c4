"""Comparing two runs of the same operations: what a suffix returns with what the full model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.split.tree import tensors

TOLERANCE = 1e-6  # relative to the largest magnitude of each output tensor, in float32


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
    same = torch.equal(ours[~finite].nan_to_num(nan=0.5), theirs[~finite].nan_to_num(nan=0.5))
    if not same or not torch.equal(finite, theirs.isfinite()):
        return float("inf")
    scale = ours[finite].abs().amax() if finite.any() else ours.new_ones(())
    gap: Any = (ours - theirs)[finite].abs().amax() if finite.any() else ours.new_zeros(())
    return float(gap / scale.clamp_min(1e-30)) if float(gap) else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """Return the bound on relative differences between two runs of the same operations in `dtype`."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps) if dtype.itemsize < 4 and dtype.is_floating_point else TOLERANCE


def mismatch(expected: Any, found: Any) -> str | None:
    """Return how the tensors in `found` differ from those in `expected`, or None where they are equal.

    Rounding within `tolerance` is no difference.
    """
    wanted, got = tensors(expected), tensors(found)
    if wanted.keys() != got.keys():
        return f"the model returns {sorted(wanted)}, the suffix {sorted(got)}"
    for leaf, tensor in wanted.items():
        gap, bound = difference(tensor.detach(), got[leaf].detach()), tolerance(tensor.dtype)
        if gap > bound:
            return (
                f"output {leaf or 'tensor'!r} differs from the full model's by {gap:.1e} (relative; bound {bound:.0e})"
            )
    return None
