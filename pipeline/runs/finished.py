"""A finished run, opened again for an export or for predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from pipeline.errors import AbsentError, DataError
from pipeline.keys import first_difference
from pipeline.precision import autocast
from pipeline.project import Project
from pipeline.project.probe import check_probe
from pipeline.project.towers import Tower, load_weights, open_tower
from pipeline.runs.record import WEIGHTS, read_run, settings

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precisions by their names in training -> in encoding."""


@dataclass(frozen=True)
class FinishedRun(Tower):
    """An encoder of a finished run, on the samples it was trained on.

    The suffix has the trained weights, and is in eval mode.
    """

    legend: Sequence[Any]
    """The meaning of its outputs, from when it was trained."""

    @contextmanager
    def inference(self, device: torch.device) -> Iterator[None]:
        """Give the context of forward passes on `device`: the precision of training, and no gradients."""
        with torch.no_grad(), autocast(PRECISIONS[self.loaded.project.train.precision], device):
            yield


def towers_of(project: Project, name: str) -> list[str | None]:
    """Return the tower names of the run `name`; [None] if it has one encoder."""
    return [part.tower for part in project.overridden(read_run(project, name).overrides).parts]


def has_states(project: Project, name: str, tower: str | None, keys: np.ndarray) -> bool:
    """Return whether the store of the run `name` has the states of all `keys` (n, 16) uint8."""
    run = read_run(project, name)
    project = project.overridden(run.overrides)
    part = project.part(tower)
    return not part.open_store(part.at(project.cut(str(run.cut)))).missing(keys).any()


def open_run(project: Project, name: str, tower: str | None = None, *, suffix_only: bool = False) -> FinishedRun:
    """Open the finished run `name`, or one tower of it; neither raw data nor another recipe's store is read.

    With `suffix_only`, only the suffix has weights where the store has them, for samples whose states are stored.

    Raises:
        AbsentError: the weights that params.yaml names are not on this machine.
        ConfigError: its cut was never encoded, or it has no such tower.
        DataError: the run does not exist, or does not fit today's settings and sample table.
        StaleStoreError: the store was encoded under another recipe; the message names the first field that differs.
    """
    run = read_run(project, name)
    project = project.overridden(run.overrides)
    table = project.training_table()
    if changed := first_difference(run.settings, settings(project, table)):
        setting, then, now = changed
        raise DataError(
            f"run {name} was trained with {setting} = {then!r}, {project.params} gives {now!r}; set it back, or train "
            "again"
        )
    try:
        opened = open_tower(project.part(tower), project.cut(str(run.cut)), table, suffix_only=suffix_only)
    except AbsentError as absent:
        raise AbsentError(
            f"run {name}: {absent}; what a store carries is enough to train, an export and predictions take the layers "
            "before the cut too"
        ) from absent
    weights = project.run_path(name) / WEIGHTS
    try:
        load_weights(opened, weights)
    except (RuntimeError, SafetensorError) as error:
        raise DataError(
            f"run {name}: {weights} does not fit today's settings and labels; train it again "
            f"({' '.join(str(error).split())})"
        ) from error
    opened.suffix.eval()
    loaded = opened.loaded
    if not suffix_only:
        check_probe(opened.store.plain, opened.prefix, loaded.preprocess(None), loaded.project.encode)
    return FinishedRun(**vars(opened), legend=run.legend)
