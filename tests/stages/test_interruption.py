"""Ctrl-C and SIGTERM: one line that says what is kept, and a run that goes on and says so."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from test_processes import torchrun

from pipeline.project import Project
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

EPOCHS = 100
INTERRUPTED = "recycle: interrupted; "


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Have children hear SIGINT, which what a shell starts in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """120 images, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(40))
    return tmp_path


def interrupt(started: subprocess.Popen[str], number: int, empty: Callable[[], object]) -> str:
    """Send a signal to all processes of a session, as a terminal does, once it has `empty`; return what was said."""
    while not empty():
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    os.killpg(started.pid, number)
    return started.communicate(timeout=120)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_encode_keeps_its_segments(folder: Path, workers: int) -> None:
    tiny.write_params(folder, encode={"cuts": [0.5], "workers": workers, "segment_samples": 4, "batch_size": 2})
    started = tiny.recycle(folder, "encode")
    said = interrupt(started, signal.SIGINT, lambda: list(folder.glob("data/activations/0.5/*/zarr.json")))
    assert started.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith(f"{INTERRUPTED}the segments that were written are kept")
    assert "Traceback" not in said
    before = tiny.files(folder / "data/activations")
    assert encode_project(Project.load(Path("params.yaml")))
    assert before.items() <= tiny.files(folder / "data/activations").items()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_goes_on_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture, number: int, code: int
) -> None:
    project = Project.load(tiny.write_params(folder, encode={"cuts": [1.0]}, train={"epochs": EPOCHS}))
    assert encode_project(project)
    started = tiny.recycle(folder, "train", "--cut", "1.0")
    said = interrupt(started, number, lambda: list(folder.glob(".recycle/checkpoints/*/latest/progress.json")))
    assert started.returncode == code, said
    assert said.strip().splitlines()[-1].startswith(f"{INTERRUPTED}the epochs that ended are kept")
    assert "Traceback" not in said
    (checkpoint,) = folder.glob(".recycle/checkpoints/*")
    found = next(file for name in ("latest", "previous") if (file := checkpoint / name / "progress.json").exists())
    done = json.loads(found.read_text())["rounds"]
    caplog.set_level("INFO", logger="recycle")
    assert len(train_project(project, "1.0").history) == EPOCHS
    place = checkpoint.relative_to(folder)
    assert f"goes on from epoch {done + 1}/{EPOCHS}, checkpoint {place}" in caplog.messages


def test_interrupted_processes_of_one_run_say_it_once(folder: Path) -> None:
    assert encode_project(
        Project.load(tiny.write_params(folder, encode={"cuts": [1.0]}, train={"epochs": 10 * EPOCHS}))
    )
    started = torchrun(folder, "-m", "stages.cli", "train", "--cut", "1.0")
    said = interrupt(started, signal.SIGINT, lambda: list(folder.glob(".recycle/checkpoints/*/latest/progress.json")))
    assert started.returncode != 0
    assert said.count(INTERRUPTED) == 1, said


def test_an_interrupted_prediction_writes_nothing(folder: Path) -> None:
    project = Project.load(
        tiny.write_params(folder, encode={"cuts": [0.5], "workers": 0, "segment_samples": 4}, train={"epochs": 1})
    )
    assert encode_project(project)
    train_project(project, "0.5")
    for seed in range(1000, 1300):
        (folder / "photos/circle" / f"{seed}.png").write_bytes(tiny.draw(0, seed))
    started = tiny.recycle(folder, "predict", "--model", "0.5", "--output", "said.jsonl")
    said = interrupt(started, signal.SIGINT, lambda: list(folder.glob(".recycle/predict/*/store/*/zarr.json")))
    assert started.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith(f"{INTERRUPTED}no predictions were written")
    assert "Traceback" not in said
    assert not (folder / "said.jsonl").exists()


def test_a_usage_error_has_its_own_code(folder: Path) -> None:
    started = tiny.recycle(folder, "train")
    assert "Missing option '--cut'" in started.communicate()[0]
    assert started.returncode == 2
