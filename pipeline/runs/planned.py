"""Runs to train: a grid or a list of settings -> planned runs, of which all faults are reported at once."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import read_yaml
from pipeline.errors import ConfigError, DataError, RecyclingError
from pipeline.keys import JSON
from pipeline.project import CutName, Project
from pipeline.runs import record
from pipeline.runs.record import Run

CUT = "cut"
NAME = "name"
"""Keys of a run in a list, beside its settings."""
CHECKPOINTS = "checkpoints"
"""Folder in `work_dir` with a folder for each run that is being trained."""

Settings = Mapping[str, JSON]
"""What a run sets, as in {"cut": 0.5, "train.lr": 0.001}; `name` is optional."""


@dataclass(frozen=True)
class PlannedRun:
    """A run to train."""

    project: Project
    """With the settings of the run."""
    cut: CutName
    name: str
    made_of: Mapping[str, Any]
    """Everything that decides it, as `provenance` returns it."""

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides the run."""
        return record.identity(self.made_of)

    @property
    def folder(self) -> Path:
        """The folder that the finished run is in."""
        return self.project.run_path(self.name)

    @property
    def checkpoint(self) -> Path:
        """The folder of its checkpoints."""
        return self.project.work_dir / CHECKPOINTS / self.identity

    def finished(self) -> Run | None:
        """Return the finished run if there is one of the same settings, samples and stores."""
        try:
            run = record.read_run(self.project, self.name)
        except DataError:
            return None
        is_whole = run.identity == self.identity and (self.folder / record.WEIGHTS).exists()
        return run if is_whole else None


def list_runs(cuts: Sequence[str], grid: Mapping[str, Sequence[JSON]], file: Path | None = None) -> list[Settings]:
    """Return every combination of `cuts` and the values of `grid`, and the runs of a YAML file.

    The file has `runs`, a list of settings, or a `grid`, which adds to the one that is given; runs without a cut of
    their own are listed for each of `cuts`.

    Raises:
        ConfigError: the file has another content.
    """
    runs, of_file = ([], {}) if file is None else _read(file)
    grid = {**of_file, **grid}
    bases: list[dict[str, JSON]] = [{CUT: cut} for cut in cuts] or [{}]
    combined: list[dict[str, JSON]] = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    listed = [*runs, *(combined if grid or not runs else [])]
    return [{**base, **own} for base in bases for own in listed]


def _read(file: Path) -> tuple[list[dict[str, JSON]], dict[str, list[JSON]]]:
    content = read_yaml(file)
    runs, grid = content.get("runs") or [], content.get("grid") or {}
    if unknown := sorted(content.keys() - {"runs", "grid"}):
        raise ConfigError(f"{file}: it has {', '.join(unknown)}; it may have runs (a list) and grid (a mapping)")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{file}: runs is no list of mappings; write one as in - {{cut: 0.5, train.lr: 0.001}}")
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(f"{file}: grid is no mapping of lists; write one as in {{train.lr: [0.001, 0.0001]}}")
    return runs, grid


def plan_runs(params: Path, fixed: Settings, runs: Sequence[Settings]) -> list[PlannedRun]:
    """Return the run of each of `runs`, whose settings replace the `fixed` ones and those of the file `params`.

    A run without a cut stands for one of each of `encode.cuts`.

    Raises:
        ConfigError: with one line per fault of all runs.
    """
    planned, faults = list[PlannedRun](), list[str]()
    for settings in runs:
        try:
            planned += _planned(params, {**fixed, **settings})
        except RecyclingError as error:
            faults += str(error).splitlines()
    for name, count in Counter(run.name for run in planned).items():
        if count > 1:
            faults.append(f"{count} runs would be called {name}; leave one out, or give each a name in a file (--file)")
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return planned


def _planned(params: Path, settings: dict[str, Any]) -> Iterator[PlannedRun]:
    cut, name = settings.pop(CUT, None), settings.pop(NAME, None)
    if wrong := [setting for setting in settings if "." not in str(setting)]:
        raise ConfigError(f"{wrong[0]!r} is no setting; write SECTION.SETTING, as in train.lr, or {CUT} or {NAME}")
    project = Project.load(params, settings)
    for own in project.encode.cuts if cut is None else [project.cut(str(cut))]:
        called = record.run_name(project, own) if name is None else str(name)
        project.run_path(called)
        yield PlannedRun(project, own, called, record.provenance(project, own))
