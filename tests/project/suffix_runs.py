"""Projects whose runs open the pretrained suffix, and the ways in which a run may open it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.report.summary import Run
from pipeline.workflows.train import train_project


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty images and a file of weights for the tiny network, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    torch.manual_seed(3)
    save_file(tiny.ConvNet(3).state_dict(), tmp_path / "net.safetensors")
    return tmp_path


def project(**changes: dict[str, object]) -> Project:
    given = {"weights": "net.safetensors"} | changes.pop("model", {})
    return Project.load(tiny.write_params(Path(), model=given, **changes))


def hide(path: Path) -> Path:
    return path.rename(path.with_name(f"hidden-{path.name}"))


def result(run: Run) -> object:
    """What a run gave, but for how long it took."""
    weights = load_file(Path("results/runs") / run.name / "model.safetensors")
    kept = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in weights.items()}
    return [[{name: row[name] for name in row if "seconds" not in name} for row in run.history], kept, run.identity]


def age(weights: Path) -> None:
    """Make the files of weights old enough to be known by their stamps."""
    for file in [weights, *weights.rglob("*")]:
        os.utime(file, ns=(0, 10**18))


def check_ways(made: Project, cut: str, weights: Path) -> None:
    """A run of the whole network, one of a suffix whose weights are known, and one where they are missing are equal."""
    age(weights)
    for cache in Path(".recycle").glob("*recipes.json"):
        cache.unlink()
    with counted() as built:
        whole = train_project(made, cut, name="whole")
        assert len(built) == len(made.parts)
        known = train_project(made, cut, name="known")
        assert len(built) == len(made.parts), "the whole network is built for one run only"
    hidden = hide(weights)
    try:
        missing = train_project(made, cut, name="missing")
    finally:
        hidden.rename(weights)
    assert result(whole) == result(known) == result(missing)


@contextmanager
def counted() -> Iterator[list[Project]]:
    """Collect the projects whose whole network is built and loaded."""
    build, built = LoadedModel._build.__func__, list[Project]()

    def counting(cls: type[LoadedModel], project: Project, *more: object) -> LoadedModel:
        loaded = build(cls, project, *more)
        built.append(project)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "_build", classmethod(counting))
        yield built
