"""Splitting any network exactly into a frozen prefix and a trainable suffix; docs/mechanism.md explains how.

The modules in the order in which a split happens:

1.  `splitting`: `split` and `merge`, the flow that calls the others. At its end the suffix is compared with the full
    model, or the split is refused, and warnings are given of exact splits that may not be what the user wants.
2.  `splittable`: which models can be split, and copies of them.
3.  `forward`: one observed forward pass; `blocks`: the repeated units in it; `cut`: the place that the user names, and
    where the tensors that cross it come from.
4.  `observation`: runs of the full model that take tensors at a cut.
5.  `plan`: what must be stored and kept, found by runs of the suffix. They are a `phantom_run`: the model's own
    `forward` on tensors without values (`phantom`, `operations`).
6.  `layout`: proves the batch axis of each stored tensor. `inputs`: how the example called the model. `prefix`: returns
    the state of a batch.
7.  `suffix`: runs the rest of the model from a state, with its `frozen` parameters set aside. `replay`: gets to the cut
    without the recycled layers, by a `recording` made once per kind of input.

`saved` writes a proved split down and builds its suffix again. `regions` recomputes or compiles blocks. `sections` runs
several batches block by block, each in a thread (`turns`). `candidates` lists the places to cut, with their costs.
`tree` (tensors inside nested values) serves all of them.
"""

from pipeline.split.candidates import Candidate, candidates, flops_around, places
from pipeline.split.cut import Cut
from pipeline.split.forward import value_of
from pipeline.split.inputs import TensorSpec
from pipeline.split.prefix import Capture, Prefix, State
from pipeline.split.regions import compile_blocks, recompute_blocks
from pipeline.split.saved import load_suffix, save_split, with_model
from pipeline.split.sections import Placement, divide, run_together
from pipeline.split.splitting import merge, split
from pipeline.split.suffix import Suffix

__all__ = [
    "Candidate",
    "Capture",
    "Cut",
    "Placement",
    "Prefix",
    "State",
    "Suffix",
    "TensorSpec",
    "candidates",
    "compile_blocks",
    "divide",
    "flops_around",
    "load_suffix",
    "merge",
    "places",
    "recompute_blocks",
    "run_together",
    "save_split",
    "split",
    "value_of",
    "with_model",
]
