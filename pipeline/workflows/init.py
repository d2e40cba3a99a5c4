"""Init: a look at the data -> params.yaml, dvc.yaml, data/plots.json and the lines of .gitignore and .dvcignore."""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap

from pipeline.config import set_values
from pipeline.data import SampleTable, propose, remarks
from pipeline.errors import ConfigError, RecyclingError
from pipeline.files import write_whole
from pipeline.models.installed import DEFAULTS, installed_backbones
from pipeline.project import Project
from pipeline.project.new_params import dump_params, propose_params, read_example
from pipeline.tasks import open_task
from pipeline.tracked import init_dvc

PARAMS, PIPELINE, PLOTS = Path("params.yaml"), Path("dvc.yaml"), Path("data/plots.json")
STORES = Path("data")
"""Folder of the stores and the sample table."""
IGNORED_BY_GIT = ("/.recycle/", "/data/activations/", "/data/samples.parquet", "/results/runs/**/*.safetensors")
IGNORED_BY_DVC = (".recycle/", ".*.part", "**/.tmp-*")
"""Caches, files that are being written, and folders of segments that are being written."""


@dataclass(frozen=True)
class Choices:
    """How what a look at the data leaves open is decided; by default without questions.

    Attributes:
        choose: returns an option, given a question and options whose first is the proposal.
        confirm: returns the answer to a question.
    """

    choose: Callable[[str, Sequence[str]], str] = lambda question, options: options[0]
    confirm: Callable[[str], bool] = lambda question: False


@dataclass(frozen=True)
class NewProject:
    """What `init_project` wrote."""

    project: Project
    table: SampleTable
    written: Sequence[Path]
    commands: Sequence[str]
    """The commands that come next."""

    def __str__(self) -> str:
        data, task = self.project.data, self.project.task.kind
        splits = Counter(self.table.split.tolist())
        counts = ", ".join(f"{splits[name]:,} {name}" for name in ("train", "validation", "test") if splits[name])
        labels = self.table.targets["label"].tolist() if task == "classification" else []
        classes = f", {len(set(labels)):,} classes" if labels else ""
        return "\n".join(
            [
                f"{data.path}: {len(self.table):,} samples of source {data.source} ({counts}){classes}",
                f"task: {task}; model: {self.project.model.backbone}",
                *(f"note: {remark}" for remark in remarks(self.table)),
                f"written: {', '.join(map(str, self.written))}; change what you like in params.yaml",
                f"next: {' && '.join(self.commands)}",
            ]
        )


def init_project(
    data: Path | None,
    *,
    task: str | None = None,
    backbone: str | None = None,
    template: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    git: bool = False,
    dvc: bool = False,
    choices: Choices | None = None,
) -> NewProject:
    """Write a project for `data` into the current folder; every sample is read once, for its key.

    Without `data`, it is what lies in the current folder. `template` names an example whose settings are taken.
    `overrides` replace settings, as in {"train.epochs": 5}. `git` and `dvc` initialise a repository if there is none.

    Raises:
        ConfigError: a file exists already, the data are not recognised, or a setting is wrong; nothing was written.
        DataError: the data cannot be read, or do not allow the task; nothing was written.
    """
    choices = choices or Choices()
    for path in (PARAMS, PIPELINE, PLOTS):
        if path.exists():
            raise ConfigError(f"{path} exists already, and is not replaced; remove it, or work in another folder")
    if template is None:
        params = _proposed(data or _find_data(), task, backbone, choices)
    else:
        params = _from_example(template, data, task, backbone)
    set_values(params, overrides or {})
    write_whole(PARAMS, dump_params(params))
    try:
        project = Project.load(PARAMS)
        table = _read_samples(project)
    except (RecyclingError, KeyboardInterrupt):
        PARAMS.unlink()
        raise
    for path in (PIPELINE, PLOTS):
        write_whole(path, (files("pipeline") / "templates" / path.name).read_text(encoding="utf-8"))
    written = [PARAMS, PIPELINE, PLOTS]
    written += _append_lines(Path(".gitignore"), [*IGNORED_BY_GIT, *_line_of(Path(str(project.data.path)))])
    written += _append_lines(Path(".dvcignore"), IGNORED_BY_DVC)
    return NewProject(project, table, written, [*_set_up_repository(git, dvc, choices), "dvc repro"])


def _proposed(data: Path, task: str | None, backbone: str | None, choices: Choices) -> CommentedMap:
    """Return proposed settings; what a look cannot decide is asked."""
    if data.resolve() in (Path().resolve(), STORES.resolve()):
        raise ConfigError(f"the data are in {data}/, where stores and results come; move them to a folder of their own")
    proposal = propose(data)
    task = task or choices.choose("task", [proposal.task])
    if backbone is None:
        content = "language" if task == "lm" else proposal.content
        found = {model["backbone"]: model for model in installed_backbones(content)}
        backbone = choices.choose("backbone", list(found) or [DEFAULTS[content]])
        return propose_params(proposal, task, found.get(backbone, {"backbone": backbone}))
    return propose_params(proposal, task, {"backbone": backbone})


def _from_example(template: str, data: Path | None, task: str | None, backbone: str | None) -> CommentedMap:
    """Return the settings of an example, with the data, the task and the backbone that are given."""
    params = read_example(template)
    if data is not None:
        params["data"]["path"] = str(data)
    if task is not None:
        params["task"] = {"kind": task}
    if backbone is not None:
        params["model"] = {"backbone": backbone}
    return params


def _find_data() -> Path:
    """Return the only entry of the current folder that is a data set.

    Raises:
        ConfigError: there is none, or several.
    """
    found = []
    for entry in sorted(Path().iterdir()):
        if not entry.name.startswith(".") and entry not in (STORES, Path("results")):
            try:
                propose(entry)
            except RecyclingError:
                continue
            found.append(entry)
    if len(found) != 1:
        there = ", ".join(map(str, found)) or "none that is recognised"
        raise ConfigError(f"the data sets in this folder: {there}; name one: recycle init DATA")
    return found[0]


def _read_samples(project: Project) -> SampleTable:
    """Return the sample table that the data give, with a head for its labels checked."""
    source = project.source()
    table = project.sample_table(source, project.keys_of(source))
    open_task(project.task).head(table)
    return table


def _line_of(data: Path) -> list[str]:
    """Return the line of .gitignore for raw data inside of the project."""
    return [] if data.is_absolute() or ".." in data.parts else [f"/{data.as_posix()}{'/' if data.is_dir() else ''}"]


def _append_lines(path: Path, lines: Sequence[str]) -> list[Path]:
    """Add those of `lines` that the file lacks; return the path if there were any."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    new = [f"{line}\n" for line in lines if line not in text.splitlines()]
    if new:
        write_whole(path, "".join([text, "\n" if text and not text.endswith("\n") else "", *new]))
    return [path] if new else []


def _set_up_repository(git: bool, dvc: bool, choices: Choices) -> Iterator[str]:
    """Initialise git and DVC where that is wanted and not done; yield the commands that are left to the user."""
    has_git = _is_inside(".git")
    if not has_git and (git or choices.confirm("initialise git here?")):
        subprocess.run(["git", "init", "--quiet"], check=True)  # noqa: S607
        has_git = True
    if _is_inside(".dvc"):
        return
    is_root = Path(".git").exists()
    if dvc or choices.confirm("initialise DVC here?"):
        init_dvc(has_git=has_git, is_root=is_root)
        return
    yield "dvc init" if is_root else "dvc init --subdir" if has_git else "dvc init --no-scm"


def _is_inside(name: str) -> bool:
    here = Path().resolve()
    return any((folder / name).exists() for folder in (here, *here.parents))
