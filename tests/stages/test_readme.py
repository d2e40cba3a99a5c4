"""README's own settings and commands, run literally."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from test_dvc import ROOT, commit, run, stages

pytestmark = pytest.mark.slow


def test_the_readme_s_settings_and_commands(tmp_path: Path) -> None:
    """As they stand there, but for weights that need a network, and for the time that so many pixels take."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    settings, commands = re.search(r"```yaml\n(data:.*?)```\n\n```\n(dvc repro.*?)```", text, re.DOTALL).groups()
    for old, new in {"weights: pretrained ": "weights: null ", "224": "32", "epochs: 10": "epochs: 1"}.items():
        assert old in settings
        settings = settings.replace(old, new)
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".gitignore").write_text(".recycle/\n/data/photos\n/my-model\n/new-photos\n")
    (tmp_path / "params.yaml").write_text(settings)
    tiny.write_images(tmp_path / "data/photos", range(5))
    tiny.write_images(tmp_path / "new-photos", range(5, 6))
    commit(tmp_path)
    (tmp_path / "bin").mkdir()
    recycle_ = f'#!/bin/sh\nexec "{sys.executable}" -m stages.cli "$@"\n'
    (tmp_path / "bin/recycle").write_text(recycle_)
    (tmp_path / "bin/recycle").chmod(0o755)
    for line in commands.splitlines():
        run(tmp_path, "sh", "-c", f'PATH="$PWD/bin:$PATH"; {line}')
    assert (tmp_path / "predictions.parquet").is_file()
    assert stages(run(tmp_path, "dvc", "repro")) == ["train@0", "train@layer4", "train@1.0", "report"]
