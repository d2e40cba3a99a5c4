"""SIGKILL at any moment: what was committed stays, and the rerun ends where an undisturbed run would have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny

MOMENTS = int(os.environ.get("RECYCLE_KILLS", "4"))
"""Kills of one encode; the acceptance run sets 20."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished project, and the seconds its encode took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make(folder)
    start = time.monotonic()
    finish(folder, "encode")
    seconds = time.monotonic() - start
    finish(folder, "train", "--cut", "0.5")
    return folder, seconds


def make(folder: Path) -> None:
    tiny.write_images(folder / "photos", range(80))
    tiny.write_params(folder, encode={"segment_samples": 10}, train={"epochs": 4})


def finish(folder: Path, *args: str) -> None:
    process = tiny.recycle(folder, *args)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_encode_is_finished_by_the_next(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    make(tmp_path)
    finished, seconds = undisturbed
    draw = random.Random(0)
    for _ in range(MOMENTS):
        process = tiny.recycle(tmp_path, "encode")
        time.sleep(draw.uniform(0.6, 1.0) * seconds)
        kill(process)
    finish(tmp_path, "encode")
    assert tiny.files(tmp_path / "data/activations") == tiny.files(finished / "data/activations")
    assert (tmp_path / "data/samples.parquet").read_bytes() == (finished / "data/samples.parquet").read_bytes()


def test_a_killed_training_goes_on_to_the_same_weights(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    make(tmp_path)
    finish(tmp_path, "encode")
    process = tiny.recycle(tmp_path, "train", "--cut", "0.5")
    checkpoints = tmp_path / ".recycle/checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("*/latest/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    kill(process)
    left = list(checkpoints.glob("*/latest/progress.json"))
    assert left, "the run ended before it could be killed; give it more epochs"
    finish(tmp_path, "train", "--cut", "0.5")
    run = Path("results/runs/0.5/model.safetensors")
    assert (tmp_path / run).read_bytes() == (undisturbed[0] / run).read_bytes()
    assert not list(checkpoints.iterdir())
