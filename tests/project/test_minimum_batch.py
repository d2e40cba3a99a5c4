"""Batches that are too small to train on: one value per channel for a batch norm, one pair for a loss that compares."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_processes import torchrun
from torch import Tensor, nn

import pipeline.workflows.train
from pipeline.data import DataConfig, Row, Source
from pipeline.errors import TrainError
from pipeline.project import Project
from pipeline.tasks import Head
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow


class Pooled(nn.Module):
    """Its batch norms see a map of 1 x 1, so one value per sample and channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(tiny.block(i, 8) for i in (3, 8, 8, 8)))
        self.classifier = nn.Linear(8, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(x.mean((2, 3), keepdim=True)).flatten(1))


def pooled(head: Head) -> nn.Module:
    return Pooled(head.size or 6)


POOLED = {"model": {"backbone": "test_minimum_batch:pooled"}}
PAIRS = {
    "data": {"source": "pairs", "path": "pairs.jsonl", "validation": 0, "anchor": "q", "positive": "a"},
    "preprocess": {"kind": "text", "image_size": None},
}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units of every batch that is trained on, in their order."""
    found: list[int] = []
    fit = pipeline.workflows.train.fit

    def noted(suffix: nn.Module, task: Any, training: Any, *args: Any, **settings: Any) -> Any:
        found.extend(len(batch.rows) for batch in training)
        return fit(suffix, task, training, *args, **settings)

    monkeypatch.setattr(pipeline.workflows.train, "fit", noted)
    return found


def project(folder: Path, samples: int = 17, **changes: dict[str, Any]) -> Project:
    """An encoded project of so many images, all of them to train on."""
    for number in range(samples):
        place = folder / "photos" / tiny.CLASSES[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(tiny.draw(number % 2, number))
    given: dict[str, dict[str, Any]] = {"data": {"validation": 0}, "encode": {"cuts": [0.5]}, **POOLED}
    loaded = Project.load(tiny.write_params(folder, **{**given, **changes}))
    assert encode_project(loaded)
    return loaded


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"batch_size": 16}, [17]),
        ({"batch_size": 8}, [8, 9]),
        ({"batch_size": 8, "gradient_accumulation": 2}, [8, 9]),
        ({"batch_size": 5}, [5, 5, 5, 2]),
        ({"batch_size": 2, "group_by_length": True}, [2, 2, 2, 2, 2, 2, 2, 3]),
    ],
)
def test_a_last_sample_joins_the_batch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], train: dict[str, Any], expected: list[int]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train_project(project(tmp_path, train=train), "0.5")
    assert sizes == expected
    assert all(np.isfinite(row["train/loss"]) for row in run.history)


@pytest.mark.parametrize("backbone", ["tiny:conv_net", "ranks:smooth_net"])
def test_where_one_sample_trains_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], backbone: str
) -> None:
    monkeypatch.chdir(tmp_path)
    train_project(project(tmp_path, model={"backbone": backbone}), "0.5")
    assert sizes == [16, 1]


def test_frozen_statistics_need_no_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.chdir(tmp_path)
    train_project(project(tmp_path, train={"batch_size": 16, "adapter": "lora"}), "0.5")
    assert sizes == [16, 1]


def test_trying_one_sample_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = project(tmp_path, samples=4, model={"backbone": "tiny:conv_net"}, train={"batch_size": 3})
    seen: list[tuple[dict[str, Tensor], Tensor]] = []
    look = pipeline.workflows.train.minimum_units

    def watched(towers: Any, suffix: nn.Module, *args: Any) -> int:
        before, state = {k: v.clone() for k, v in suffix.state_dict().items()}, torch.get_rng_state()
        least = look(towers, suffix, *args)
        assert all(torch.equal(before[name], tensor) for name, tensor in suffix.state_dict().items())
        seen.append((before, state))
        assert torch.equal(state, torch.get_rng_state())
        return least

    monkeypatch.setattr(pipeline.workflows.train, "minimum_units", watched)
    train_project(settings, "0.5")
    assert any("running_mean" in name for name in seen[0][0])


class Numbers(Source):
    """Arrays, each with a number to regress."""

    def __init__(self, config: DataConfig) -> None:
        self.rows: int = config.options["rows"]

    def __len__(self) -> int:
        return self.rows

    def row(self, i: int) -> Row:
        return Row(f"row {i}", None, {"label": float(i)})

    def content(self, i: int) -> np.ndarray:
        return np.full((3, 8, 8), i + 1.0, np.float32)


@pytest.mark.parametrize(
    ("rows", "validation", "size", "message"),
    [
        (6, 0, 1, r"train\.batch_size is 1; a batch norm .* needs 2 units in a step; give it as many"),
        (1, 0, 16, r"the training split has 1 units; a batch norm .* needs 2 units in a step"),
        (3, 0.9999, 16, r"the training split is empty; lower data\.validation"),
    ],
)
def test_too_few_for_any_batch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, validation: float, size: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"source": "test_minimum_batch:Numbers", "path": None, "options": {"rows": rows}, "validation": validation}
    params = tiny.write_params(
        tmp_path,
        **POOLED,
        data=data,
        preprocess={"kind": "array", "image_size": None},
        task={"kind": "regression"},
        encode={"cuts": [0.5]},
        train={"batch_size": size},
    )
    settings = Project.load(params)
    assert encode_project(settings)
    with pytest.raises(TrainError, match=message):
        train_project(settings, "0.5")
    assert not (tmp_path / "results/runs").exists()


def test_two_processes_that_take_statistics_apart_need_two_samples_each(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path / "home")
        project(tmp_path / "home", train={"batch_size": 8})
    started = torchrun(tmp_path / "home", "-m", "stages.cli", "train", "--cut", "0.5", "--name", "two")
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    history = json.loads((tmp_path / "home/results/runs/two/run.json").read_text())["history"]
    assert all(np.isfinite(row["train/loss"]) for row in history)


@pytest.mark.parametrize(
    ("task", "expected"), [({}, [4, 6]), ({"memory": 20}, [4, 4, 2])], ids=["compared with the batch", "with a memory"]
)
def test_a_last_pair_that_has_nothing_to_compare_with_joins_the_batch_before(
    tmp_path: Path,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    task: dict[str, Any],
    expected: list[int],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("one", "two", "three", "good", "bad")
    lines = [{"q": f"{one} {two}", "a": f"{two} {one}"} for one, two in zip(words, words[1:] + words[:1], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line | {"split": "train"}) + "\n" for line in lines))
    more = [{"q": f"{one} {one}", "a": one, "split": "validation"} for one in words[:2]]
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in more)
    data = PAIRS["data"] | {"split": "split"}
    params = tiny.write_params(
        tmp_path,
        **{**PAIRS, "data": data},
        model={"backbone": f"hf:{text_folder}"},
        task={"kind": "similarity", **task},
        encode={"cuts": [0.5]},
        train={"batch_size": 2, "epochs": 1},
    )
    settings = Project.load(params)
    assert encode_project(settings)
    run = train_project(settings, "0.5")
    assert sizes == expected
    assert run.history[0]["train/loss"] > 0
