"""Many runs in one process, and the same list shared among several."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_flow_similarity
import tiny
from click.testing import CliRunner

import pipeline.train.fit
from pipeline.errors import ConfigError
from pipeline.project import Project
from pipeline.runs.planned import list_runs, plan_runs
from pipeline.train.checkpoint import claimed_checkpoint
from pipeline.workflows.encode import encode_project
from pipeline.workflows.report import report_project
from pipeline.workflows.sweep import SweepResult, sweep_project
from pipeline.workflows.train import train_project
from stages.sweep import command

pytestmark = pytest.mark.slow

PARAMS = Path("params.yaml")

texts = test_flow_similarity.folder


class Killed(BaseException):
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with 60 images and two encoded cuts, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    assert encode_project(Project.load(tiny.write_params(tmp_path, encode={"cuts": [0.5, 1.0]})))
    return tmp_path


def sweep(grid: dict[str, list[Any]], cuts: tuple[str, ...] = ("0.5",), **options: Any) -> SweepResult:
    return sweep_project(PARAMS, {}, list_runs(cuts, grid), **options)


def left(name: str) -> tuple[bytes, dict[str, Any], list[str]]:
    """What a run left: its weights, its record without times and name, and the names of its files."""
    folder = Path("results/runs") / name
    run = json.loads((folder / "run.json").read_text())
    del run["name"], run["train_seconds_per_epoch"]
    for row in run["history"]:
        del row["train/seconds"]
    return (folder / "model.safetensors").read_bytes(), run, sorted(tiny.files(folder))


def compare_with_single_runs(result: SweepResult, count: int) -> None:
    """Train the runs of a sweep again, one by one, and compare what they leave."""
    assert len(result.finished) == count
    for run in result.finished:
        train_project(Project.load(PARAMS, run.overrides), str(run.cut), "alone")
        assert left(run.name) == left("alone"), run.name


@pytest.mark.parametrize(
    "grid",
    [
        {"train.lr": [0.01, 0.001], "train.seed": [0, 1]},
        {"train.precision": ["no", "bf16"], "train.gradient_accumulation": [2, 1]},
        {"train.adapter": ["lora", None], "train.seed": [3, 4]},
        {"train.channels_last": [True, False], "train.optimizer": ["SGD", "AdamW"]},
        {"data.fraction": [0.5, 1.0], "train.keep": ["last", "best"]},
        {"task.class_weights": ["balanced", None], "train.max_steps": [3, 5]},
    ],
    ids=lambda grid: next(iter(grid)),
)
def test_runs_of_a_sweep_leave_what_single_runs_leave(folder: Path, grid: dict[str, list[Any]]) -> None:
    compare_with_single_runs(sweep(grid), 4)


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("loss", [{"loss": "arcface"}, {"loss": "center"}, {"memory": 30}], ids=str)
def test_a_loss_that_learns_starts_anew_in_each_run(tmp_path: Path, loss: dict[str, Any]) -> None:
    encode_project(test_flow_similarity.project(tmp_path, layers=[6], **loss))
    compare_with_single_runs(sweep({"train.seed": [0, 1], "train.epochs": [1]}), 2)


def test_a_finished_run_is_not_trained_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = {"train.lr": [0.01, 0.001]}
    names = [run.name for run in sweep(grid, ("0.5", "1.0")).finished]
    assert names == ["0.5-0.01", "0.5-0.001", "1.0-0.01", "1.0-0.001"]
    before = tiny.files(folder / "results/runs")
    caplog.set_level("INFO", logger="recycle")
    sweep(grid | {"train.lr": [0.01, 0.001, 0.1]}, ("0.5", "1.0"))
    assert "6 runs, 4 of them finished already" in caplog.messages
    after = tiny.files(folder / "results/runs")
    assert before.items() < after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"0.5-0.1", "1.0-0.1"}
    assert {row.settings for row in report_project(Project.load(PARAMS))} == {
        "train.lr=0.01",
        "train.lr=0.001",
        "train.lr=0.1",
    }
    assert not list((folder / ".recycle/checkpoints").iterdir())
    tiny.write_params(folder, encode={"cuts": [0.5, 1.0]}, train={"epochs": 1})
    assert all(len(run.history) == 1 for run in sweep(grid).finished)


def test_all_faults_are_told_before_the_first_run(folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        sweep({"train.lr": [-1.0, 0.1], "train.sed": [1, 2]}, ("0.5", "0.7"))
    lines = str(refused.value).splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "params.yaml: train.lr: -1.0: Input should be greater than 0",
        "params.yaml: train.sed: unknown setting (did you mean seed?)",
    ]
    with pytest.raises(ConfigError, match=r"the cut is '0\.7'; encode\.cuts has 0\.5, 1\.0"):
        sweep({"train.lr": [0.1]}, ("0.5", "0.7"))
    with pytest.raises(ConfigError, match=r"2 runs would be called 0\.5-0\.1; leave one out, or give each a name"):
        sweep({"train.lr": [0.1, 0.1]})
    with pytest.raises(ConfigError, match=r"train\.precision is fp16, which the CPU does not train in"):
        sweep({"train.precision": ["no", "fp16"]})
    assert not Path("results/runs").exists()


def test_a_run_that_fails_does_not_end_the_others(folder: Path) -> None:
    result = sweep({"train.lr": [0.01, 1e15, 0.001]})
    assert [run.name for run in result.finished] == ["0.5-0.01", "0.5-0.001"]
    assert list(result.failed) == ["0.5-1000000000000000.0"]
    assert "the training loss is nan" in result.failed["0.5-1000000000000000.0"]
    done = CliRunner().invoke(command, ["--cut", "0.5", "--grid", "train.lr=0.01,1e15,0.001"])
    assert "1 of 3 runs failed:\nrun 0.5-1000000000000000.0: the training loss is nan" in str(done.exception)
    assert len(done.stdout.splitlines()) == 2


def test_a_run_that_another_process_trains_is_left_to_it(folder: Path) -> None:
    (first, _) = plan_runs(PARAMS, {}, list_runs(["0.5"], {"train.seed": [0, 1]}))
    with claimed_checkpoint(first.checkpoint) as is_ours:
        assert is_ours
        result = sweep({"train.seed": [0, 1]})
    assert ([run.name for run in result.finished], result.elsewhere) == (["0.5-1"], ["0.5-0"])
    assert len(sweep({"train.seed": [0, 1]}).finished) == 2


def test_a_killed_sweep_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, save, saved = {"train.seed": [0, 1]}, pipeline.train.fit.save, []

    def dying(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        saved.append(1)
        if len(saved) == 3:  # after the first of two epochs of the second run
            raise Killed

    monkeypatch.setattr(pipeline.train.fit, "save", dying)
    with pytest.raises(Killed):
        sweep(grid)
    result = sweep(grid)
    assert len(saved) == 4
    compare_with_single_runs(result, 2)


def test_the_runs_of_a_file(folder: Path) -> None:
    Path("runs.yaml").write_text(
        "runs:\n  - {cut: 1.0, train.lr: 0.1, name: best}\n  - {train.seed: 3}\ngrid:\n  train.lr: [1e-3, 0.02]\n"
    )
    fixed = {"train.epochs": 1}
    planned = plan_runs(PARAMS, fixed, list_runs([], {}, Path("runs.yaml")))
    names = ["best", "0.5-1-3", "1.0-1-3", "0.5-1-0.001", "1.0-1-0.001", "0.5-1-0.02", "1.0-1-0.02"]
    assert [run.name for run in planned] == names
    assert planned[0].project.train.lr == 0.1
    assert [run.name for run in plan_runs(PARAMS, {}, list_runs([], {}))] == ["0.5", "1.0"]
    for text, message in {
        "run: []": r"runs\.yaml: it has run; it may have runs \(a list\) and grid",
        "runs: {cut: 0.5}": r"runs is no list of mappings",
        "grid: {train.lr: 0.1}": r"grid is no mapping of lists",
        "runs: [{lr: 0.1}]": r"'lr' is no setting; write SECTION\.SETTING",
    }.items():
        Path("runs.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            plan_runs(PARAMS, {}, list_runs([], {}, Path("runs.yaml")))


def test_the_command_prints_the_best_run_first(folder: Path) -> None:
    arguments = ["--cut", "0.5", "--grid", "train.lr=0.00001,0.01", "--set", "train.epochs=3"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    first, second = done.stdout.splitlines()
    assert first.startswith("0.5-3-0.01   accuracy ")
    assert second.startswith("0.5-3-1e-05  accuracy ")


def test_processes_share_the_runs_and_take_over_those_of_a_dead_one(folder: Path) -> None:
    """Two processes of which one is killed during a run: the other trains that too."""
    tiny.write_params(folder, encode={"cuts": [0.5, 1.0]}, train={"epochs": 150})
    started = tiny.recycle(folder, "sweep", "--cut", "0.5", "--grid", "train.seed=0,1,2", "--jobs", "2")
    checkpoints = folder / ".recycle/checkpoints"
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("*/latest"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    holders = [child for child in psutil.Process(started.pid).children() if is_helper(child, checkpoints)]
    assert len(holders) == 1
    holders[0].send_signal(signal.SIGKILL)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 0, said
    assert "1 of 1 processes ended early, with -9" in said
    assert said.count("goes on from epoch") == 1
    assert len(list(folder.glob("results/runs/*/run.json"))) == 3
    assert said.count(" after epoch ") == 3, "no run is trained twice"


def is_helper(process: psutil.Process, checkpoints: Path) -> bool:
    """Return whether a process holds the folder of a run open."""
    links = Path(f"/proc/{process.pid}/fd").iterdir()
    return any(link.readlink().is_relative_to(checkpoints) for link in links if link.is_symlink())
