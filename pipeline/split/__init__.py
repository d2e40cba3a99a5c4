"""Splitting any network exactly into a frozen prefix and a trainable suffix.

Where to read on: `cut` is the flow of a split, `splittable` says which models it takes. `trace` and `blocks` find the
place; `planner` and `plan` discover what must cross it, by `replay` of the model's own `forward` on `phantom` tensors,
of which `operations` make others; `record` and `prefix` take it from the full model; `layout` proves its batch axis;
`suffix` runs the rest, with `frozen` weights set aside; `check` compares it with the full model. `fast` replaces
phantoms by a `recording` that `shells` follow, once `acceptance` found that both do the same. `choices` lists the
places to cut, with their costs.
"""

from pipeline.split.blocks import Cut
from pipeline.split.choices import Candidate, candidates, flops_around
from pipeline.split.cut import merge, split
from pipeline.split.prefix import Capture, Prefix, State, TensorSpec, capture
from pipeline.split.suffix import Suffix

__all__ = [
    "Candidate",
    "Capture",
    "Cut",
    "Prefix",
    "State",
    "Suffix",
    "TensorSpec",
    "candidates",
    "capture",
    "flops_around",
    "merge",
    "split",
]
