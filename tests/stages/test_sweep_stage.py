"""The stage of docs/sweeps.md: a sweep under DVC."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from test_dvc import ROOT, commit, run, stages

pytestmark = pytest.mark.slow


def test_a_stage_may_be_a_sweep(tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    stage = re.search(r"```yaml\n(  sweep:\n.*?)```", page, re.DOTALL).group(1)
    del pipeline["stages"]["train"]
    pipeline["stages"] |= yaml.safe_load(stage)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/plots.json", tmp_path / "data")
    (tmp_path / ".gitignore").write_text(".recycle/\n/photos\n")
    tiny.write_images(tmp_path / "photos", range(12))
    dtypes = {"codec": "raw", "dtype": "float16", "precision": "float32", "views": None}
    tiny.write_params(tmp_path, data={"seed": 0}, encode={"cuts": [0.5, 1.0], **dtypes}, train={"epochs": 1})
    (tmp_path / "sweep.yaml").write_text("grid: {train.lr: [0.01, 0.001]}")
    commit(tmp_path)
    said = run(tmp_path, "dvc", "repro")
    assert stages(said) == ["encode", "sweep", "report"]
    (tmp_path / "sweep.yaml").write_text("grid: {train.lr: [0.01, 0.001, 0.1]}")
    said = run(tmp_path, "dvc", "repro")
    assert stages(said) == ["sweep", "report"]
    assert "6 runs, 4 of them finished already" in said
    assert stages(run(tmp_path, "dvc", "repro")) == []
    names = {f"{cut}-{rate}" for cut in (0.5, 1.0) for rate in (0.01, 0.001, 0.1)}
    shown = run(tmp_path, "dvc", "exp", "show", "--csv").splitlines()[0].split(",")
    assert {f"{name}.accuracy" for name in names} <= set(shown)
    assert {f"{row['cut']}-{row['settings'].removeprefix('train.lr=')}" for row in summary(tmp_path)} == names


def summary(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "results/summary.json").read_text())
