"""One module per verb, told from top to bottom; `stages/X.py` parses and calls `workflows/X.py`.

A module is imported when it is first used: most need torch, which `--help` and a wrong option do not.

init.py          a look at the data -> params.yaml, dvc.yaml
plan.py          raw data -> predicted costs of every cut, settings to use
plan_text.py     a plan -> text
trials/          what a plan tries on a sample: settings, cuts
encode.py        raw data -> stores, sample table
train.py         stores, sample table -> a finished run
sweep.py         a list of runs, stores, sample table -> finished runs
report.py        finished runs -> table, plot, page
predict.py       finished runs, inputs -> predictions
evaluate.py      a finished run, labelled samples -> scores
export.py        a finished run -> a plain model
cuts.py          a model -> every place to cut it, with costs
codec_error.py   a store -> what each codec would change
store_upkeep.py  the stores of a project, and the samples that its tables refer to
"""

from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.memory import import_for_good

if TYPE_CHECKING:
    from pipeline.workflows import (
        cuts,
        encode,
        evaluate,
        export,
        init,
        plan,
        predict,
        report,
        store_upkeep,
        sweep,
        train,
    )

__all__ = [
    "cuts",
    "encode",
    "evaluate",
    "export",
    "init",
    "plan",
    "predict",
    "report",
    "store_upkeep",
    "sweep",
    "train",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_for_good(f"{__name__}.{name}")
