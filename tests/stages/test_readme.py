"""README's own settings and commands, run literally."""

import re
import sys
from pathlib import Path

import pytest
import tiny
from test_dvc import ROOT, run, stages

from pipeline.project import Project

pytestmark = pytest.mark.slow


def test_the_readme_s_settings_and_commands(tmp_path: Path) -> None:
    """As they stand there, but for the time that so many pixels and epochs take."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands, settings = re.search(r"```\n(recycle init.*?)```.*?```yaml\n(data:.*?)```", text, re.DOTALL).groups()
    (tmp_path / "shown.yaml").write_text(settings)
    assert Project.load(tmp_path / "shown.yaml").task.kind == "classification"
    tiny.write_images(tmp_path / "photos", range(5))
    tiny.write_images(tmp_path / "new-photos", range(5, 6))
    (tmp_path / "bin").mkdir()
    recycle_ = f'#!/bin/sh\nexec "{sys.executable}" -m stages.cli "$@"\n'
    (tmp_path / "bin/recycle").write_text(recycle_)
    (tmp_path / "bin/recycle").chmod(0o755)
    first, *others = commands.splitlines()
    first = first.replace("--dvc", "--dvc --set preprocess.image_size=32 --set train.epochs=1")
    for line in [first, *others]:
        run(tmp_path, "sh", "-c", f'PATH="$PWD/bin:$PATH"; {line}')
    assert (tmp_path / "predictions.parquet").is_file()
    assert stages(run(tmp_path, "dvc", "repro")) == ["train@0.75", "train@1.0", "report"]
