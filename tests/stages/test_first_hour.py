"""From a folder of photos, or a table of texts, to scores: `recycle init`, then `dvc repro`, without a commit."""

from pathlib import Path

import pytest
import tiny
from test_dvc import run, stages

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", [("--git", "--dvc"), ("--dvc",)], ids=["with git", "without"])
def test_the_first_repro_succeeds(tmp_path: Path, options: tuple[str, ...]) -> None:
    for split in ("train", "test"):
        tiny.write_images(tmp_path / "photos" / split, range(12))
    settings = ["--set=preprocess.kind=image", "--set=preprocess.image_size=16", "--set=train.epochs=1"]
    said = run(tmp_path, "recycle", "init", "photos", "--backbone", "tiny:conv_net", *options, *settings)
    assert "next: dvc repro" in said
    said = run(tmp_path, "dvc", "repro")
    assert stages(said) == ["encode", "train@0.5", "train@0.75", "train@1.0", "report"]
    if "--git" in options:
        new = run(tmp_path, "git", "status", "--short", "--untracked-files=all")
        assert not [line for line in new.splitlines() if "photos" in line or "activations" in line or "tensors" in line]
        assert "samples.parquet" not in new
