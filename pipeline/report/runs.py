"""Finished runs: where each lies, what it was made of, and whether that still holds.

Run NAME lies in results/runs/NAME: `model.safetensors` is what was trained, `run.json` what was measured and which
settings replaced those of params.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.data import SampleTable
from pipeline.errors import AbsentError, ConfigError, DataError, StoreError
from pipeline.files import sha256
from pipeline.keys import JSON, digest, first_difference
from pipeline.project import CutName, Project
from pipeline.project.towers import Tower, load_weights, open_tower
from pipeline.report.summary import STORE, Run
from pipeline.tasks import open_task

log = logging.getLogger("recycle")

FILE = "run.json"
WEIGHTS = "model.safetensors"


def run_name(project: Project, cut: CutName) -> str:
    """Return what a run is called where it is not said: the cut and the values that replace those of params.yaml.

    Where the states lie changes nothing about a run.

    Raises:
        ConfigError: a run is called so already that gave these values to other settings.
    """
    own = _replaced(project.overrides)
    name = "-".join(map(str, [cut, *own.values()]))
    try:
        others = _replaced(read(project, name).overrides)
    except DataError:  # there is none, or nothing reads it any more
        return name
    if own.keys() != others.keys():
        here, there = (", ".join(settings) or "nothing" for settings in (own, others))
        raise ConfigError(
            f"this run would be called {name}, as is one that sets {there} where this one sets {here}; give it another "
            "name (--name)"
        )
    return name


def identity(project: Project, cut: CutName) -> str:
    """Return the digest of everything that decides a run: settings, samples, and the recipes of the stores."""
    stores = [part.open_store(part.at(cut), view).recipe.digest for part in project.parts for view in part.views]
    sections = (project.model, project.task, project.train, *([project.towers] if project.towers.is_set else []))
    settings: list[JSON] = [section.model_dump(mode="json", exclude={"residency"}) for section in sections]
    return digest([*stores, sha256(project.samples), project.data.fraction, project.data.seed, *settings])


def settings(project: Project, table: SampleTable) -> dict[str, JSON]:
    """Return the settings that a trained model must be read with: those of its network, and its head but for the size,
    which the labels decide; of several towers those of each.
    """
    if project.towers.is_set and project.tower is None:
        return {str(part.tower): settings(part, table) for part in project.parts}
    head = open_task(project.task).head(table)
    return {
        "model": project.model.model_dump(mode="json"),
        "head": {"kind": head.kind, "pooling": head.pooling, "layers": list(head.layers)},
    }


def write(project: Project, run: Run) -> None:
    """Write the run.json of a run whose folder exists."""
    (project.run_path(run.name) / FILE).write_text(json.dumps(dataclasses.asdict(run), indent=2) + "\n")


def read(project: Project, name: str) -> Run:
    """Return the run called `name`.

    Raises:
        DataError: there is none, or another version of this program wrote it; the message names those there are.
    """
    file = project.run_path(name) / FILE
    if not file.exists():
        known = ", ".join(sorted(folder.parent.name for folder in _files(project))) or "none"
        raise DataError(f"run {name}: {file} does not exist; train it (dvc repro train); finished runs: {known}")
    try:
        return Run(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}); train the run again") from error


@dataclass(frozen=True)
class FinishedRun(Tower):
    """An encoder of a finished run, on the samples it was trained on.

    The suffix has the trained weights, and is in eval mode.
    """

    legend: Sequence[Any]
    """What its outputs mean, as they did when it was trained."""


def towers_of(project: Project, name: str) -> list[str | None]:
    """Return how the encoders of the run `name` are called: [None] where there is one."""
    return [part.tower for part in project.overridden(read(project, name).overrides).parts]


def open_run(project: Project, name: str, tower: str | None = None) -> FinishedRun:
    """Open the finished run `name`, or one tower of it; neither raw data nor another recipe's store is read.

    Raises:
        AbsentError: the weights that params.yaml names are not on this machine.
        ConfigError: its cut was never encoded, or it has no such tower.
        DataError: the run does not exist, or does not fit today's settings and sample table.
        StaleStoreError: the store was encoded under another recipe; the message names the first field that differs.
    """
    run = read(project, name)
    project = project.overridden(run.overrides)
    table = SampleTable.read(project.samples).share(
        project.data.fraction, project.data.seed, by_label=project.task.kind != "regression"
    )
    if changed := first_difference(run.settings, settings(project, table)):
        setting, then, now = changed
        raise DataError(
            f"run {name} was trained with {setting} = {then!r}, {project.params} gives {now!r}; set it back, or train "
            "again"
        )
    try:
        opened = open_tower(project.part(tower), project.cut(str(run.cut)), table)
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
    return FinishedRun(**vars(opened), legend=run.legend)


def current(project: Project) -> list[Run]:
    """Return the finished runs that today's settings, samples and stores would give again.

    Raises:
        DataError: a cut of `encode.cuts` has none.
    """
    kept = [run for run in _readable(project) if _holds(project, run)]
    for cut in map(str, project.encode.cuts):
        if cut not in {str(run.cut) for run in kept}:
            raise DataError(f"cut {cut}: {project.results / 'runs'} has no run of it; train it (dvc repro train)")
    return kept


def _files(project: Project) -> list[Path]:
    return list((project.results / "runs").glob(f"*/{FILE}"))


def _readable(project: Project) -> Iterator[Run]:
    for file in sorted(_files(project)):
        try:
            yield read(project, file.parent.name)
        except DataError as error:
            log.warning("%s; it is left out", error)


def _replaced(overrides: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return the overrides that make a run another one."""
    return {setting: value for setting, value in overrides.items() if setting != STORE}


def _holds(project: Project, run: Run) -> bool:
    if str(run.cut) not in map(str, project.encode.cuts):
        return False
    try:
        if identity(project.overridden(run.overrides), run.cut) == run.identity:
            return True
    except (OSError, StoreError):
        pass
    log.warning("run %s was made of other settings, samples or stores: it is left out; train it again", run.name)
    return False
