"""Splitting any network exactly into a frozen prefix and a trainable suffix."""

from pipeline.split.blocks import Cut
from pipeline.split.cut import Candidate, candidates, merge, split
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
    "merge",
    "split",
]
