"""Finished runs: where each lies, what it was made of, and whether that still holds.

Run NAME lies in results/runs/NAME: `model.safetensors` is what was trained, `run.json` what was measured and which
settings replaced those of params.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.data import SampleTable
from pipeline.errors import AbsentError, ConfigError, DataError, StoreError
from pipeline.files import sha256
from pipeline.keys import JSON, digest, first_difference
from pipeline.project import CutName, Project
from pipeline.project.probe import check_probe
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


def made_of(project: Project, cut: CutName) -> dict[str, Any]:
    """Return everything that decides a run: the recipes of its stores, its samples, and its settings by section."""
    names = ("model", "task", "train", *(["towers"] if project.towers.is_set else []))
    return {
        "stores": [part.open_store(part.at(cut), view).recipe.digest for part in project.parts for view in part.views],
        "samples": sha256(project.samples),
        "data": {"fraction": project.data.fraction, "seed": project.data.seed},
        **{name: getattr(project, name).model_dump(mode="json", exclude={"residency"}) for name in names},
    }


def identity(made_of: Mapping[str, Any]) -> str:
    """Return the digest of everything that decides a run."""
    sections = [settings for name, settings in made_of.items() if name not in ("stores", "samples", "data")]
    return digest([*made_of["stores"], made_of["samples"], *made_of["data"].values(), *sections])


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
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("frozen_seconds_per_sample", None)  # earlier versions timed the layers before the cut in every run
        return Run(**content)
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
    bench = opened.bench
    check_probe(opened.store.plain, opened.prefix, bench.preprocess(None), bench.project.encode)
    return FinishedRun(**vars(opened), legend=run.legend)


def current(project: Project) -> list[Run]:
    """Return the finished runs that today's settings, samples and stores would give again; log why others are not.

    Raises:
        DataError: there is none; the message names the reasons.
    """
    kept, left_out = list[Run](), list[str]()
    for file in sorted(_files(project)):
        try:
            run = read(project, file.parent.name)
            reason = _difference(project, run)
        except DataError as error:
            left_out.append(f"{error}; it is left out")
            continue
        if reason is None:
            kept.append(run)
        else:
            left_out.append(f"run {run.name} is left out: {reason}")
    trained = {str(run.cut) for run in kept}
    missing = [str(cut) for cut in project.encode.cuts if str(cut) not in trained]
    if not kept:
        raise DataError(
            "\n".join([*left_out, f"{project.results / 'runs'} has no run to report; train one (dvc repro train)"])
        )
    for line in left_out:
        log.warning(line)
    if missing:
        log.warning("cuts without a run: %s; train them (dvc repro train)", ", ".join(missing))
    return kept


def _files(project: Project) -> list[Path]:
    return list((project.results / "runs").glob(f"*/{FILE}"))


def _replaced(overrides: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return the overrides that make a run another one."""
    return {setting: value for setting, value in overrides.items() if setting != STORE}


def _difference(project: Project, run: Run) -> str | None:
    """Say in what today's settings, samples and stores differ from those that `run` was made of; None: in nothing."""
    if str(run.cut) not in map(str, project.encode.cuts):
        return f"its cut {run.cut} is not among encode.cuts"
    try:
        today = made_of(project.overridden(run.overrides), run.cut)
    except ConfigError as error:
        return f"its settings do not hold any more ({error})"
    except (OSError, StoreError) as error:
        return f"what it was made of cannot be read ({error})"
    return None if identity(today) == run.identity else _changed(run.made_of, today)


def _changed(then: Mapping[str, Any], today: Mapping[str, Any]) -> str:
    """Say what has changed since a run was made of `then`, which earlier versions did not write."""
    if not then:
        return "it was made of other settings, samples or stores; train it again"
    if then["stores"] != today["stores"]:
        return "its states have been encoded anew with other settings; train it again"
    if then["samples"] != today["samples"]:
        return "the samples, their labels or their splits have changed; train it again"
    setting, before, now = first_difference(then, today) or ("a setting", "another", "this")
    return f"it has {setting} = {before!r}, now it is {now!r}; train it again, or set it back"
