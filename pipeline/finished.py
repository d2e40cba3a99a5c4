"""A finished run, opened: its store, the model split at its cut, and the weights that were trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.data import SampleTable
from pipeline.errors import DataError
from pipeline.project import Project, Workbench
from pipeline.split import Prefix, Suffix
from pipeline.views import Views


@dataclass(frozen=True)
class FinishedRun:
    """What a run was trained on, and what came of it."""

    name: str
    bench: Workbench
    table: SampleTable
    """The samples it was trained on."""
    store: Views
    prefix: Prefix
    suffix: Suffix
    """With the trained weights, in eval mode, on the CPU."""
    classes: Sequence[Any]
    """What its outputs are called, in their order; empty where they have no names."""


def open_run(project: Project, name: str) -> FinishedRun:
    """Open the finished run `name`; neither raw data nor another recipe's store is read.

    Raises:
        ConfigError: its cut was never encoded.
        DataError: the run does not exist, or does not fit today's settings and sample table.
        StaleStoreError: the store was encoded under another recipe; the message names the first field that differs.
    """
    cut, classes, weights = _find(project, name)
    table = SampleTable.read(project.samples)
    bench = Workbench.open(project, table)
    today = bench.task.classes(table)
    if today != classes:
        raise DataError(
            f"run {name} was trained on the classes {_few(classes)}; {project.samples} has {_few(today)}; train it again"
        )
    store, prefix, suffix = bench.open_store(cut, table)
    try:
        suffix.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise DataError(
            f"run {name}: {weights} does not fit today's settings ({' '.join(str(error).split())[:300]}); train it again"
        ) from error
    return FinishedRun(name, bench, table, store, prefix, suffix.eval(), classes)


def _find(project: Project, name: str) -> tuple[Any, list[Any], Path]:
    weights = project.results / "runs" / name / "model.safetensors"
    if not weights.exists():
        known = sorted(file.parent.name for file in (project.results / "runs").glob("*/model.safetensors"))
        raise DataError(f"run {name}: {weights} does not exist; finished runs: {', '.join(known)}; train it first")
    run = json.loads((weights.parent / "run.json").read_text())
    return run["cut"], run["classes"], weights


def _few(classes: Sequence[Any]) -> str:
    named = ", ".join(map(str, classes[:5]))
    return named + (f", ... ({len(classes)})" if len(classes) > 5 else "") or "(none)"
