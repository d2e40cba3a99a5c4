"""Similarity from the store: heads that are stacks of layers, losses with state of their own, killed runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import pipeline.train.fit
from pipeline.data import SampleTable
from pipeline.errors import ConfigError, TrainError
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.tasks.layers import build_head
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty texts under the words that most of theirs are, and thirty pairs of them, in the current directory."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)

    def text(word: str) -> str:
        return " ".join([word] * 4 + draw.choice(WORDS, 3).tolist() + [word] * int(draw.integers(4)))

    lines = [{"text": text(word), "label": word, "q": text(word), "a": text(word)} for word in WORDS * 12]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def project(folder: Path, *, pairs: bool = False, train: Mapping[str, object] | None = None, **task: object) -> Project:
    fields = {"anchor": "q", "positive": "a"} if pairs else {"text": "text", "label": "label"}
    data = {"source": "pairs" if pairs else "text", "path": "texts.jsonl", "validation": 0.3, **fields}
    return Project.load(
        tiny.write_params(
            folder,
            data=data,
            model={"backbone": f"hf:{folder / 'bert'}"},
            preprocess={"kind": "text", "image_size": None},
            task={"kind": "similarity", **task},
            encode={"cuts": [0.5]},
            train={"epochs": 4, "batch_size": 4, **(train or {})},
        )
    )


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_head_is_trained_exported_and_built_again(folder: Path, pooling: str) -> None:
    head: Any = {"pooling": pooling, "layers": [{"skip": {"dropout": 0.1}}, "layer_norm", {"widening": 2}, "gated", 5]}
    encode_project(project(folder, **head))
    run = train_project(project(folder, **head, precision_at=[1, 5]), "0.5")
    assert run.recycled == 0.5  # of two layers: those of the head are none
    assert {"validation/precision_at_5", "validation/r_precision"} < run.history[0].keys()
    assert export_run(project(folder, **head), "0.5", folder / "model").merged < 1e-5
    described = json.loads((folder / "model/backbone.json").read_text())
    again = build_head(described["layers"], described["features"])
    again.load_state_dict(load_file(folder / "model/projection.safetensors"))
    loaded = LoadedModel.open(project(folder, **head), SampleTable.read(Path("data/samples.parquet")))
    trained = load_file("results/runs/0.5/model.safetensors")
    assert {f"projection.{name}" for name in again.state_dict()} < trained.keys()
    assert all(torch.equal(trained[f"projection.{name}"], weight) for name, weight in again.state_dict().items())
    assert described["pooling"] == pooling
    assert loaded.task.width == loaded.backbone.width == 5


class Killed(BaseException):
    pass


STATEFUL: list[dict[str, Any]] = [
    {"loss": "arcface", "train": {"gradient_accumulation": 3}},
    {"loss": "center", "layers": [6]},
    {"loss": "contrastive", "memory": 30},
    {"loss": "multiple_negatives", "memory": 27, "symmetric": True, "pairs": True},
]


@pytest.mark.parametrize("settings", STATEFUL, ids=str)
def test_a_killed_run_goes_on_with_the_losses_own_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    weights, save, committed = Path("results/runs/0.5/model.safetensors"), pipeline.train.fit.save, []
    encode_project(project(folder, **settings))
    undisturbed = train_project(project(folder, **settings), "0.5")
    expected = weights.read_bytes()

    def dying(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        committed.append(1)
        if len(committed) == 2:
            raise Killed

    monkeypatch.setattr(pipeline.train.fit, "save", dying)
    with pytest.raises(Killed):
        train_project(project(folder, **settings), "0.5")
    resumed = train_project(project(folder, **settings), "0.5")
    assert len(committed) == 4
    for name in ("train/loss", "validation/precision_at_1"):
        assert [row[name] for row in resumed.history] == [row[name] for row in undisturbed.history]
    assert weights.read_bytes() == expected


def test_settings_that_leave_nothing_to_compare(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size is 1: one pair, or one label, per step"):
        project(folder, train={"batch_size": 1})
    encode_project(project(folder))
    with pytest.raises(TrainError, match=r"task\.memory is 8 embeddings; a batch brings 16"):
        train_project(project(folder, memory=8), "0.5")
