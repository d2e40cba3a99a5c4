"""The pipeline under DVC: what runs again after which change, and what DVC can show."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC repository with the shipped dvc.yaml and 60 images, reproduced once."""
    folder = tmp_path_factory.mktemp("project")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/plots.json", folder / "data")
    shutil.copy(ROOT / ".dvcignore", folder)
    (folder / ".gitignore").write_text(".recycle/\n/photos\n")
    tiny.write_images(folder / "photos", range(20))
    dtypes = {"codec": "raw", "dtype": "float16", "precision": "float32", "views": None}
    chosen = {"fraction": 1.0, "seed": 0}
    tiny.write_params(folder, data=chosen, encode={"cuts": [0.5, 1.0], **dtypes}, train={"epochs": 1})
    commit(folder)
    said = run(folder, "dvc", "repro")
    assert stages(said) == ["encode", "train@0.5", "train@1.0", "report"]
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "--quiet", "--message", "as it is")


def run(folder: Path, *command: str, code: int = 0) -> str:
    person = {f"GIT_{who}_{what}": "somebody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = (
        os.environ
        | person
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": tiny.IMPORTS,
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
        }
    )
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def stages(said: str) -> list[str]:
    return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]


def set_param(folder: Path, section: str, name: str, value: object) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[section][name] = value
    path.write_text(yaml.safe_dump(params))


def test_a_changed_preprocessing_replaces_no_store_unasked(project: Path) -> None:
    before = tiny.files(project / "data/activations")
    said = run(project, "dvc", "exp", "run", "--set-param", "preprocess.image_size=12", code=255)
    assert "data/activations/0.5 was encoded with preprocessing.image_size = 16, expected 12" in said
    assert "encode.replace: true" in said
    assert tiny.files(project / "data/activations") == before
    run(project, "git", "checkout", "--quiet", "params.yaml")
    assert stages(run(project, "dvc", "repro")) == []


def test_nothing_changed_runs_nothing(project: Path) -> None:
    assert stages(run(project, "dvc", "repro")) == []
    assert "up to date" in run(project, "dvc", "status")


def test_dvc_shows_metrics_and_plots(project: Path) -> None:
    shown = run(project, "dvc", "metrics", "show")
    assert "results/runs/0.5/metrics.json" in shown
    assert shown.splitlines()[0].split() == ["Path", "validation.accuracy", "validation.macro_f1"]
    assert "validation.accuracy" in run(project, "dvc", "exp", "show", "--csv")
    page = run(project, "dvc", "plots", "show", "--out", "plots").strip().splitlines()[-1]
    content = Path(page.removeprefix("file://")).read_text()
    assert re.findall('<div id = "(.*?)"', content) == ["validation_score", "training_loss"]
    assert "runs.png" in content
    assert content.count('"color": {"field": "run", "type": "nominal"}') == 2
    assert all(f'"run": "{cut}"' in content for cut in ("0.5", "1.0"))
    shutil.rmtree(project / "plots")


def test_a_changed_learning_rate_trains_and_does_not_encode(project: Path) -> None:
    said = run(project, "dvc", "exp", "run", "--set-param", "train.lr=0.02")
    assert stages(said) == ["train@0.5", "train@1.0", "report"]


def test_ten_more_images_encode_ten(project: Path) -> None:
    before = tiny.files(project / "data/activations")
    for seed in range(100, 110):
        (project / "photos/stripe" / f"{seed}.png").write_bytes(tiny.draw(2, seed))
    assert "photos" in run(project, "dvc", "status", "encode")
    said = run(project, "dvc", "repro")
    assert stages(said) == ["encode", "train@0.5", "train@1.0", "report"]
    assert "cut 0.5: 10 samples encoded, 60 were there" in said
    after = tiny.files(project / "data/activations")
    assert before.items() < after.items()
    new = {Path(name).parts[:2] for name in after.keys() - before.keys()}
    assert len(new) == 4, "one new segment for each cut and split"
    data = run(project, "dvc", "diff", "HEAD", "--targets", "data/activations")
    assert "Deleted" not in data


def test_a_new_cut_trains_only_itself(project: Path) -> None:
    set_param(project, "encode", "cuts", [0.5, 3, "blocks.1", 1.0])
    said = run(project, "dvc", "repro")
    assert stages(said) == ["encode", "train@3", "train@blocks.1", "report"]
    assert "cut 0.5: 0 samples encoded" in said
    assert "cut 3: 70 samples encoded" in said


def test_a_compaction_that_is_committed_runs_nothing(project: Path) -> None:
    before = tiny.files(project / "data/activations")
    assert "come in their place" in run(project, "recycle", "store", "compact", "--target-samples", "60", "--yes")
    assert tiny.files(project / "data/activations") != before
    run(project, "dvc", "commit", "--force")
    assert stages(run(project, "dvc", "repro")) == []


def test_too_many_bad_samples_stop_it_before_training_and_a_mended_one_goes_on(project: Path) -> None:
    photo = project / "photos/stripe/0000.png"
    photo.write_bytes(photo.read_bytes()[:-40])
    (project / "photos/stripe/more.png").write_bytes(tiny.draw(2, 200))
    said = run(project, "dvc", "repro", code=255)
    assert stages(said) == ["encode"]
    assert "exited with 3" in said
    photo.write_bytes(tiny.draw(2, 201))
    said = run(project, "dvc", "repro", "encode")
    assert stages(said) == ["encode"]
    there = len(list((project / "photos").rglob("*.png"))) - 1
    assert f"cut 0.5: 1 samples encoded, {there} were there" in said
