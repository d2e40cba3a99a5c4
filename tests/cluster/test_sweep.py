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
def test_an_array_trains_a_run_in_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    assert encode_project(Project.load(tiny.write_params(tmp_path, train={"epochs": 1, "batch_size": 4})))
    (script,) = SCRIPT.findall(PAGE.read_text(encoding="utf-8"))
    lines = [line for line in script.splitlines() if not line.startswith("#SBATCH --gpus")]
    (tmp_path / "sweep.sbatch").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["sbatch", "--wait", "--array=1,8%2", "--cpus-per-task=1", "sweep.sbatch"],
        env=os.environ | {"PYTHONPATH": tiny.IMPORTS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = "".join(file.read_text() for file in tmp_path.glob("slurm-*.out"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    assert sorted(file.parent.name for file in tmp_path.glob("results/runs/*/run.json")) == ["0.5-0.1-0", "1.0-0.1-1"]
