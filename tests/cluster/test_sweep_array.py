"""The Slurm array of docs/sweeps.md, as it stands there but for the resources that it asks for."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny

from pipeline.project import Project
from pipeline.workflows.encode import encode_project

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/sweeps.md"
SCRIPT = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("slurm")
def test_the_tasks_of_an_array_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    assert encode_project(Project.load(tiny.write_params(tmp_path, train={"epochs": 20, "batch_size": 4})))
    (tmp_path / "sweep.yaml").write_text("grid: {cut: [0.5, 1.0], train.seed: [0, 1]}")
    (script,) = SCRIPT.findall(PAGE.read_text(encoding="utf-8"))
    lines = [line for line in script.splitlines() if not line.startswith("#SBATCH --gpus")]
    (tmp_path / "sweep.sbatch").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["sbatch", "--wait", "--array=0-1", "--cpus-per-task=1", "sweep.sbatch"],
        env=os.environ | {"PYTHONPATH": tiny.IMPORTS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = [file.read_text() for file in tmp_path.glob("slurm-*.out")]
    assert done.returncode == 0, done.stdout + done.stderr + "".join(said)
    names = ["0.5-0", "0.5-1", "1.0-0", "1.0-1"]
    assert sorted(file.parent.name for file in tmp_path.glob("results/runs/*/run.json")) == names
    trained = [line for text in said for line in text.splitlines() if " after epoch " in line]
    assert len(trained) == 4, "no run is trained twice"
