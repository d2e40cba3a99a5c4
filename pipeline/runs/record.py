"""The record of a finished run: its files, its identity, and whether it is current.

The run NAME is in results/runs/NAME: `model.safetensors` has the trained weights, `run.json` the scores and the
settings that replaced those of params.yaml.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data import SampleTable
from pipeline.errors import ConfigError, DataError, StoreError
from pipeline.files import is_function, load_function, sha256, write_whole
from pipeline.keys import JSON, digest, first_difference
from pipeline.project import CutName, Project
from pipeline.store import Store
from pipeline.tasks import open_task

STORE = "encode.store"
"""The setting of the store's location, which does not affect a run."""
FILE = "run.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Run:
    """One finished run: the fields of `run.json`."""

    name: str
    cut: float | int | str
    overrides: Mapping[str, Any]
    """Settings that replaced those of params.yaml, as in {"train.seed": 1}."""
    identity: str
    """Digest of everything that decides the run."""
    settings: Mapping[str, Any]
    """Settings of the network and of the head, needed to load the weights."""
    recycled: float
    """Share of the blocks before the cut, 0..1; the smallest of several towers."""
    metric: str
    value: float
    initial: float
    """The metric before any training."""
    best_epoch: int
    train_samples: int
    train_seconds_per_epoch: float
    history: list[dict[str, float]]
    legend: list[Any] = field(default_factory=list)
    """Meaning of the outputs, such as class names; read by the task."""
    made_of: Mapping[str, Any] = field(default_factory=dict)
    """The settings, samples and stores that `identity` digests; empty in runs of earlier versions."""
    test: Mapping[str, float] = field(default_factory=dict)
    """All scores on the test samples; empty without any, and in runs of earlier versions."""
    review: Mapping[str, Any] = field(default_factory=dict)
    """Confusions and mistakes on the validation samples, as `pipeline.tasks.review`; empty in runs of earlier versions,
    and of tasks that have none."""


def run_name(project: Project, cut: CutName) -> str:
    """Return the default name of a run: the cut and the values that replace those of params.yaml.

    The location of the store is not part of it.

    Raises:
        ConfigError: a run of this name gave these values to other settings.
    """
    own = _replaced(project.overrides)
    name = "-".join(map(str, [cut, *own.values()]))
    try:
        others = _replaced(read_run(project, name).overrides)
    except DataError:  # there is none, or nothing reads it any more
        return name
    if own.keys() != others.keys():
        here, there = (", ".join(settings) or "nothing" for settings in (own, others))
        raise ConfigError(
            f"this run would be called {name}, as is one that sets {there} where this one sets {here}; give it another "
            "name (--name)"
        )
    return name


def provenance(project: Project, cut: CutName, stores: Sequence[Store] | None = None) -> dict[str, Any]:
    """Return everything that decides a run: the recipes of its `stores`, its samples, and its settings by section.

    Without `stores`, those of all encoders and views are opened.
    """
    if stores is None:
        stores = [part.open_store(part.at(cut), view) for part in project.parts for view in part.views]
    own = {("model.backbone", part.model.backbone) for part in project.parts if part.model.library == "function"}
    own |= {("task.kind", project.task.kind)} if is_function(project.task.kind) else set()
    functions = [load_function(name, setting, "argument") for setting, name in sorted(own)]
    return {
        "stores": [store.recipe.digest for store in stores],
        "samples": sha256(project.samples),
        "data": {"fraction": project.data.fraction, "seed": project.data.seed},
        **sections(project),
        **({"code": _code(functions)} if functions else {}),
    }


def _code(functions: Sequence[Any]) -> str:
    """Return the digest of the user's own functions."""
    from pipeline.models.fingerprint import fingerprint  # noqa: PLC0415  (torch is slow to import)

    return fingerprint(functions)


def sections(project: Project) -> dict[str, dict[str, JSON]]:
    """Return the sections of the settings that decide a run, without those that have no effect on it."""
    names = ("model", "task", "train", *(["towers"] if project.towers.is_set else []))
    return {name: getattr(project, name).model_dump(mode="json", exclude={"residency", "loggers"}) for name in names}


def identity(made_of: Mapping[str, Any]) -> str:
    """Return the digest of everything that decides a run."""
    sections = [settings for name, settings in made_of.items() if name not in ("stores", "samples", "data")]
    return digest([*made_of["stores"], made_of["samples"], *made_of["data"].values(), *sections])


def settings(project: Project, table: SampleTable) -> dict[str, JSON]:
    """Return the settings needed to load a trained model: those of the network and of the head, without its size, which
    the labels decide; with towers, those of each tower.
    """
    if project.towers.is_set and project.tower is None:
        return {str(part.tower): settings(part, table) for part in project.parts}
    head = open_task(project.task).head(table)
    return {
        "model": project.model.model_dump(mode="json"),
        "head": {"kind": head.kind, "pooling": head.pooling, "layers": list(head.layers)},
    }


def write_run(project: Project, run: Run) -> None:
    """Write the run.json of a run whose folder exists."""
    write_whole(project.run_path(run.name) / FILE, json.dumps(dataclasses.asdict(run), indent=2) + "\n")


def read_run(project: Project, name: str) -> Run:
    """Return the run `name`.

    Raises:
        DataError: it does not exist, or another version wrote it; the message names the existing runs.
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


def current_runs(project: Project) -> tuple[list[Run], list[str]]:
    """Return the finished runs whose settings, samples and stores are current, and a line about each that is missing:
    why it is left out, or that a cut has none.

    Raises:
        DataError: no run is current; the message has the reasons.
    """
    kept, left_out = list[Run](), list[str]()
    for file in sorted(_files(project)):
        try:
            run = read_run(project, file.parent.name)
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
    if missing:
        left_out.append(f"cuts without a run: {', '.join(missing)}; train them (dvc repro train)")
    return kept, left_out


def _files(project: Project) -> list[Path]:
    return list((project.results / "runs").glob(f"*/{FILE}"))


def _replaced(overrides: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return the overrides that distinguish runs."""
    return {setting: value for setting, value in overrides.items() if setting != STORE}


def _difference(project: Project, run: Run) -> str | None:
    """Return how the current settings, samples and stores differ from those of `run`; None if they do not."""
    if str(run.cut) not in map(str, project.encode.cuts):
        return f"its cut {run.cut} is not among encode.cuts"
    try:
        today = provenance(project.overridden(run.overrides), run.cut)
    except ConfigError as error:
        return f"its settings do not hold any more ({error})"
    except (OSError, StoreError) as error:
        return f"its stores or samples cannot be read ({error})"
    return None if identity(today) == run.identity else _changed(run.made_of, today)


def _changed(then: Mapping[str, Any], today: Mapping[str, Any]) -> str:
    """Return what has changed since `then`, which is empty in runs of earlier versions."""
    if not then:
        return "it has other settings, samples or stores; train it again"
    if then["stores"] != today["stores"]:
        return "its states have been encoded again with other settings; train it again"
    if then["samples"] != today["samples"]:
        return "the samples, their labels or their splits have changed; train it again"
    if then.get("code") != today.get("code"):
        return "the code of your own network or task has changed; train it again"
    setting, before, now = first_difference(then, today) or ("a setting", "another", "this")
    return f"it has {setting} = {before!r}, now it is {now!r}; train it again, or set it back"
