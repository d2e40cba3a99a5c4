"""Training needs neither git nor DVC, and changes neither: outside the run's folder it writes nothing for them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of one cut, encoded."""
    folder = tmp_path_factory.mktemp("encoded")
    tiny.write_images(folder / "photos", range(4))
    tiny.write_params(folder, encode={"cuts": [1.0]})
    command(folder, sys.executable, "-m", "stages.cli", "encode")
    return folder


def command(folder: Path, *args: str) -> str:
    person = {f"GIT_{who}_{what}": "somebody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": tiny.IMPORTS, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        args, cwd=folder, env=os.environ | person | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def nothing(folder: Path) -> None:
    """A folder below no repository."""


def without_commit(folder: Path) -> None:
    command(folder, "git", "init", "--quiet")


def with_dvc_without_commit(folder: Path) -> None:
    without_commit(folder)
    command(folder, "dvc", "init", "--quiet")


def without_dvc(folder: Path) -> None:
    without_commit(folder)
    (folder / ".gitignore").write_text("*\n")
    command(folder, "git", "add", "--force", ".gitignore")
    command(folder, "git", "commit", "--quiet", "--message", "first")


@pytest.mark.parametrize("begin", [nothing, without_commit, with_dvc_without_commit, without_dvc])
def test_training_changes_neither_git_nor_dvc(encoded: Path, tmp_path: Path, begin: Callable[[Path], None]) -> None:
    begin(tmp_path)
    for name in ("data", "params.yaml"):
        (tmp_path / name).symlink_to(encoded / name)
    before = tiny.files(tmp_path)
    said = command(tmp_path, sys.executable, "-m", "stages.cli", "train", "--cut", "1.0")
    assert "init" not in said.lower()
    new = tiny.files(tmp_path).items() - before.items()
    assert {name.split("/")[0] for name, _ in new} <= {"results", ".recycle"}
    run = tmp_path / "results/runs/1.0"
    record = json.loads((run / "run.json").read_text())
    kept = record["history"][record["best_epoch"] - 1]
    scores = {name: kept[f"validation/{name}"] for name in ("accuracy", "macro_f1")}
    assert json.loads((run / "metrics.json").read_text()) == {"validation": scores}
    curve = (run / "plots/metrics/train/loss.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in curve] == ["step", "0", "1"]
