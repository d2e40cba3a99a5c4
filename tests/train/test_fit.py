"""Optimizers by name, rounds of other lengths than an epoch, and what logs and trackers say of each."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

import pipeline.train.fit
from pipeline.errors import ConfigError
from pipeline.project import Project
from pipeline.report.summary import curves, summarise
from pipeline.runs.record import Run
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer import open_optimizer
from pipeline.train.rounds import Rounds
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

WEIGHTS = Path("results/runs/0.5/model.safetensors")
STEPS_PER_EPOCH = 3
"""45 samples in batches of 16."""
LINE = r"{name}: loss [\d.]+, accuracy [\d.]+ \(best( [\d.]+)?\), \d+\.\d s(, \d:\d\d:\d\d left)?"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 images, of which 45 are trained on, encoded at 0.5, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    encode_project(Project.load(tiny.write_params(tmp_path, encode={"cuts": [0.5]})))
    return tmp_path


def trained(folder: Path, **settings: Any) -> tuple[Run, bytes]:
    """A run with settings of `train`, and its weights."""
    run = train_project(Project.load(tiny.write_params(folder, encode={"cuts": [0.5]}, train=settings)), "0.5")
    return run, WEIGHTS.read_bytes()


def refusal(**settings: Any) -> str:
    with pytest.raises(ValueError) as error:
        TrainConfig(**settings)
    return str(error.value)


def test_what_is_no_optimizer_is_refused_with_those_that_are() -> None:
    assert re.search("'Adm'; torch.optim has ASGD, .*AdamW, .*SGD", refusal(optimizer="Adm"))
    assert "LBFGS, " not in refusal(optimizer="LBFGS")
    assert "does not support dense gradients" in refusal(optimizer="SparseAdam")
    assert "AdamW takes betas, eps" in refusal(optimizer_options={"momentum": 0.9})
    assert "Invalid beta parameter" in refusal(optimizer_options={"betas": [0.9, 2.0]})
    assert "lr and weight_decay are settings of train" in refusal(optimizer_options={"lr": 0.1})
    assert "which Rprop does not take" in refusal(optimizer="Rprop", weight_decay=0.1)


def test_an_optimizer_has_the_settings_of_its_groups() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    config = TrainConfig(optimizer="SGD", optimizer_options={"momentum": 0.9}, lr=0.5, head_lr=0.25, weight_decay=0.1)
    optimizer = open_optimizer(model, config, frozenset({"1.weight", "1.bias"}))
    assert type(optimizer) is torch.optim.SGD
    found = [(group["lr"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups]
    assert found == [(0.5, 0.1, 0.9), (0.5, 0.0, 0.9), (0.25, 0.0, 0.9)]
    assert "weight_decay" not in open_optimizer(model, TrainConfig(optimizer="Rprop"), frozenset()).param_groups[0]


def test_steps_are_fused_where_torch_can() -> None:
    model = torch.nn.Linear(2, 3)

    def is_fused(**settings: Any) -> bool:
        return bool(open_optimizer(model, TrainConfig(**settings), frozenset()).defaults.get("fused"))

    assert is_fused()
    assert not is_fused(optimizer="Rprop")
    assert not is_fused(optimizer_options={"foreach": True})
    assert not is_fused(optimizer_options={"fused": False})


def test_parameters_that_an_optimizer_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr)
            if any(parameter.dim() > 2 for group in self.param_groups for parameter in group["params"]):
                raise ValueError("only matrices")

    monkeypatch.setattr(torch.optim, "Picky", Picky, raising=False)
    with pytest.raises(ConfigError, match="Picky, which does not take the parameters after this cut: only matrices"):
        open_optimizer(torch.nn.Conv1d(1, 1, 1), TrainConfig(optimizer="Picky"), frozenset())


def test_rounds_cover_every_batch_once() -> None:
    rounds = Rounds.of(TrainConfig(max_steps=8, eval_every=3, gradient_accumulation=2), batches=5)
    assert (len(rounds), rounds.steps_per_epoch) == (3, 3)
    assert [rounds.span(number) for number in range(3)] == [(0, 3), (3, 6), (6, 8)]
    assert rounds.name(2) == "epoch 3/3"
    rounds = Rounds.of(TrainConfig(epochs=2, eval_every=2), batches=5)
    assert [rounds.name(number) for number in (0, 4)] == ["steps 1-2/10", "steps 9-10/10"]
    assert (rounds.epochs_after(4), rounds.are_epochs) == (2.0, False)


@pytest.mark.slow
def test_the_log_has_a_line_per_epoch(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    trained(folder, epochs=3)
    lines = [message for message in caplog.messages if message.startswith("epoch ")]
    assert len(lines) == 3
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(LINE.format(name=f"epoch {number}/3"), line)
    assert "(best)" in lines[0]
    assert "left" not in lines[-1]
    said, _ = tiny.recycle(folder, "train", "--cut", "0.5").communicate()
    assert [line.partition(":")[0] for line in said.splitlines() if line.startswith("epoch")] == [
        f"epoch {number}/3" for number in (1, 2, 3)
    ]


@pytest.mark.slow
def test_validation_between_epochs_changes_no_weight(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    settings = {"epochs": 3, "schedule": "cosine", "warmup": 0.2, "keep": "last"}
    by_epoch, expected = trained(folder, **settings)
    assert "train/epoch" not in by_epoch.history[0]
    by_steps, found = trained(folder, eval_every=2, **settings)
    assert found == expected
    assert [round(row["train/epoch"] * STEPS_PER_EPOCH) for row in by_steps.history] == [2, 4, 6, 8, 9]
    assert by_steps.best_epoch == 3
    assert any(re.fullmatch(LINE.format(name="steps 5-6/9"), message) for message in caplog.messages)
    (row,) = summarise([by_steps], {})
    assert row.epochs == 3
    assert curves([by_steps], {})["epoch"].iloc[-1] == 3
    _, by_number = trained(folder, max_steps=9, **settings | {"epochs": 1})
    assert by_number == expected


@pytest.mark.slow
def test_a_run_ends_within_an_epoch(folder: Path) -> None:
    run, _ = trained(folder, max_steps=4)
    assert [row["train/epoch"] for row in run.history] == [1, 4 / 3]
    run, _ = trained(folder, max_steps=40, eval_every=1, lr=1e-12, patience=2)
    assert len(run.history) == 3


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_killed_within_an_epoch_goes_on_to_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, accumulation: int
) -> None:
    settings = {
        "max_steps": 7,
        "eval_every": 2,
        "batch_size": 8,
        "gradient_accumulation": accumulation,
        "optimizer": "SGD",
        "optimizer_options": {"momentum": 0.9},
        "schedule": "linear",
    }
    undisturbed, expected = trained(folder, **settings)
    save, saved = pipeline.train.fit.save, []

    def dying(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        saved.append(1)
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(pipeline.train.fit, "save", dying)
    with pytest.raises(Killed):
        trained(folder, **settings)
    caplog.set_level("INFO", logger="recycle")
    resumed, found = trained(folder, **settings)
    assert "goes on from steps 5-6/7" in caplog.text
    assert len(saved) == 4
    assert found == expected
    assert [row["train/loss"] for row in resumed.history] == [row["train/loss"] for row in undisturbed.history]


class Notes(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "tensorboard"
    requires_logging_directory = True
    told: ClassVar[list[Any]] = []

    def __init__(self, run_name: str, logging_dir: Path, **options: Any) -> None:
        super().__init__()
        self.told[:] = [(run_name, str(logging_dir), options)]

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


@pytest.mark.slow
def test_trackers_get_settings_and_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, expected = trained(folder)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Notes)
    run, found = trained(folder, loggers=["tensorboard"])
    assert (run.identity, found) == (plain.identity, expected)
    made, settings, *rows, end = Notes.told
    assert made == (folder.name, ".recycle/logs/0.5", {})
    assert settings["run"] == "0.5"
    assert (settings["train.lr"], settings["train.optimizer"], settings["task.layers"]) == (0.01, "AdamW", "[]")
    assert all(isinstance(value, (int, float, str)) for value in settings.values())
    assert rows == [(STEPS_PER_EPOCH, run.history[0]), (2 * STEPS_PER_EPOCH, run.history[1])]
    assert end == "finished"


@pytest.mark.slow
def test_a_tracker_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    with pytest.raises(ConfigError, match=r"has mlflow, comet_ml, not installed here: pip install mlflow comet-ml$"):
        trained(folder, loggers=["wandb", "mlflow", "comet_ml"])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(folder: Path) -> None:
    trained(folder, loggers=["tensorboard"])
    assert list(folder.glob(".recycle/logs/0.5/**/events.out.tfevents.*"))
