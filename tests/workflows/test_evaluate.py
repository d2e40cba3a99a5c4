"""Scores of finished runs: a test split is scored once, by the weights that validation chose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator

import pipeline.workflows.train
from pipeline.errors import DataError
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
from pipeline.runs.finished import open_run
from pipeline.runs.record import read_run
from pipeline.train.objective import evaluate
from pipeline.workflows.encode import encode_project
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

PHOTOS = {"source": "images", "path": "photos.jsonl", "image": "file", "label": "label", "split": "split"}
TRAIN = {"epochs": 4, "batch_size": 16, "lr": 0.02}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a table of 120 images, of which a third is for tests."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(40))
    write_table()
    return tmp_path


def write_table(labels: dict[int, str] | None = None) -> None:
    """Write the table of images; `labels` replace those of test images, by number."""
    splits = ["train"] * 20 + ["validation"] * 8 + ["test"] * 12
    rows = [
        {"file": f"photos/{name}/{seed:04}.png", "label": name, "split": split}
        for seed, split in enumerate(splits)
        for name in tiny.CLASSES
    ]
    test = [row for row in rows if row["split"] == "test"]
    for number, label in (labels or {}).items():
        test[number]["label"] = label
    Path("photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def project(**changes: dict[str, Any]) -> Project:
    settings = {"data": PHOTOS, "encode": {"cuts": [0.5]}, "train": TRAIN}
    settings |= {name: settings.get(name, {}) | section for name, section in changes.items()}
    path = tiny.write_params(Path(), **settings)
    return Project.load(path)


FLIPPED = {"preprocess": {"augment": [{"RandomHorizontalFlip": {}}]}, "encode": {"views": 2}}


@pytest.mark.parametrize("changes", [{}, {"train": {"adapter": "lora", "keep": "last"}}, FLIPPED], ids=str)
def test_a_test_split_is_scored_by_the_kept_weights(folder: Path, changes: dict[str, Any]) -> None:
    made = project(**changes)
    encode_project(made)
    run = train_project(made, "0.5")
    opened = open_run(made, "0.5")
    _, _, test = open_loaders([opened], opened.table, torch.device("cpu"))
    assert sum(len(batch.rows) for batch in test) == 36
    assert run.test == evaluate(opened.suffix, opened.loaded.task, test, Accelerator(cpu=True))
    assert run.test["accuracy"] > 0.5
    assert read_run(made, "0.5").test == run.test
    (row,) = report_project(made)
    assert (row.value, row.test, row.test_spread) == (run.value, run.test["accuracy"], None)


def test_test_labels_decide_nothing(folder: Path) -> None:
    encode_project(project())
    first = train_project(project(), "0.5")
    weights = Path("results/runs/0.5/model.safetensors")
    before = weights.read_bytes()
    drawn = np.random.default_rng(3).permutation([name for name in tiny.CLASSES for _ in range(12)]).tolist()
    write_table(dict(enumerate(drawn)))
    encode_project(project())
    second = train_project(project(), "0.5")
    assert weights.read_bytes() == before
    assert (second.best_epoch, second.value) == (first.best_epoch, first.value)
    assert first.test["accuracy"] > 0.6 > second.test["accuracy"]
    assert second.test["accuracy"] == pytest.approx(1 / 3, abs=0.2)


def test_a_test_label_that_training_lacks_is_refused(folder: Path) -> None:
    write_table({5: "hexagon"})
    encode_project(project())
    with pytest.raises(DataError, match=r"1 held-out samples have 1 labels that training lacks \('hexagon'\)"):
        train_project(project(), "0.5")


def test_a_run_that_is_killed_while_it_is_tested_goes_on_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_project(project())
    expected = train_project(project(), "0.5")
    scores = pipeline.workflows.train._test_scores

    def dying(*args: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.workflows.train, "_test_scores", dying)
    with pytest.raises(KeyboardInterrupt):
        train_project(project(), "0.5")
    monkeypatch.setattr(pipeline.workflows.train, "_test_scores", scores)
    monkeypatch.setattr(pipeline.train.fit, "train_epoch", dying)
    resumed = train_project(project(), "0.5")
    assert (resumed.test, resumed.best_epoch) == (expected.test, expected.best_epoch)


def test_without_test_samples_there_are_no_scores(folder: Path) -> None:
    table = Path("photos.jsonl")
    table.write_text("".join(line + "\n" for line in table.read_text().splitlines() if '"test"' not in line))
    encode_project(project())
    run = train_project(project(), "0.5")
    assert run.test == {}
    assert json.loads(Path("results/runs/0.5/run.json").read_text())["test"] == {}
