"""Scores of finished runs: a test split is scored once, by the weights that validation chose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_flow_words
import tiny
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file

import pipeline.workflows.train
from pipeline.errors import AbsentError, DataError
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
from pipeline.runs.finished import open_run
from pipeline.runs.record import read_run
from pipeline.train.objective import evaluate
from pipeline.workflows.encode import encode_project
from pipeline.workflows.evaluate import _of_whole_pairs, evaluate_run
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project
from stages import cli

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
    monkeypatch.setattr(pipeline.train.fit, "train_round", dying)
    resumed = train_project(project(), "0.5")
    assert (resumed.test, resumed.best_epoch) == (expected.test, expected.best_epoch)


def test_without_test_samples_there_are_no_scores(folder: Path) -> None:
    table = Path("photos.jsonl")
    table.write_text("".join(line + "\n" for line in table.read_text().splitlines() if '"test"' not in line))
    encode_project(project())
    run = train_project(project(), "0.5")
    assert run.test == {}
    assert json.loads(Path("results/runs/0.5/run.json").read_text())["test"] == {}


STORED = 2e-2
"""How far the rounding of stored states may move a score."""


def write_new(name: str, seeds: range, label: str | None = None) -> None:
    """Write a table of images without splits, of which those below 40 are of the project."""
    tiny.write_images(Path("photos"), seeds)
    rows = [{"file": f"photos/{kind}/{seed:04}.png", "label": label or kind} for seed in seeds for kind in tiny.CLASSES]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_own_samples_are_scored_from_the_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_project(project())
    run = train_project(project(), "0.5")
    encoded = tiny.count_forwards(monkeypatch)
    tested, is_within = evaluate_run(project(), "0.5")
    assert (tested.cached, tested.samples, tested.bad, tested.live, is_within) == (run.test, 36, 0, {}, True)
    validated, _ = evaluate_run(project(), "0.5", split="validation", live=True)
    assert validated.cached["accuracy"] == run.value
    assert validated.largest_difference <= STORED
    assert evaluate_run(project(), "0.5", split="train")[0].samples == 60
    assert not encoded
    Path("photos/circle/0039.png").unlink()
    with pytest.raises(
        DataError, match=r"1 samples of split test are not in the data set any more \(photos\.jsonl#117\)"
    ):
        evaluate_run(project(), "0.5", live=True)


def test_training_samples_in_views_are_scored_in_the_first(folder: Path) -> None:
    encode_project(project(**FLIPPED))
    train_project(project(**FLIPPED), "0.5")
    trained, _ = evaluate_run(project(**FLIPPED), "0.5", split="train", live=True)
    assert trained.samples == 60
    assert trained.largest_difference <= STORED
    tested, _ = evaluate_run(project(**FLIPPED), "0.5", live=True)
    assert tested.largest_difference <= STORED


def test_other_data_is_encoded_as_far_as_it_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_project(project())
    train_project(project(), "0.5")
    store = tiny.files(Path("data/activations"))
    encoded = tiny.count_forwards(monkeypatch)
    write_new("new.jsonl", range(30, 50))
    found, _ = evaluate_run(project(), "0.5", "new.jsonl", live=True)
    assert sum(encoded) == 30
    assert (found.samples, found.bad) == (60, 0)
    assert found.largest_difference <= STORED
    assert tiny.files(Path("data/activations")) == store
    assert not any(Path(".recycle/evaluate").iterdir())
    again, _ = evaluate_run(project(), "0.5", "photos.jsonl", "test")
    assert (again.samples, again.cached) == (36, read_run(project(), "0.5").test)
    Path("few.jsonl").write_text(Path("photos.jsonl").read_text().replace('"test"', '"train"'))
    with pytest.raises(DataError, match=r"--split is test; few\.jsonl has no sample in it"):
        evaluate_run(project(), "0.5", "few.jsonl", "test")
    write_new("new.jsonl", range(30, 50), "hexagon")
    with pytest.raises(DataError, match=r"run 0\.5 on new\.jsonl: .* labels that training lacks \('hexagon'\)"):
        evaluate_run(project(), "0.5", "new.jsonl")


def test_labels_that_changed_since_are_refused(folder: Path) -> None:
    encode_project(project())
    run = train_project(project(), "0.5")
    table = Path("photos.jsonl")
    table.write_text(table.read_text().replace('"label": "circle"', '"label": "zircle"'))
    encode_project(project())
    with pytest.raises(DataError, match=r"its outputs mean 'circle', .* and the labels now give 'square'"):
        evaluate_run(project(), "0.5")
    assert run.legend == list(tiny.CLASSES)


def test_bad_samples_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode_project(project())
    train_project(project(), "0.5")
    write_new("new.jsonl", range(50, 55))
    for name in ("circle", "square"):
        Path(f"photos/{name}/0050.png").write_bytes(b"broken")
    Path("photos/stripe/0051.png").unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--run", "0.5", "--input", "new.jsonl", "--live", "--json"])
    assert ended.value.code == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["samples"], said["bad"], said["data"]) == (12, 3, "new.jsonl")
    assert said["cached"].keys() == said["live"].keys() == {"accuracy", "macro_f1"}
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--run", "0.5"])
    assert ended.value.code == 0
    assert "run 0.5, split test: 36 samples" in capsys.readouterr().out


WORDS = ("one", "two", "three", "good", "bad")


def write_lines(file: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 12))) for _ in range(60)]
    lines = [
        {
            "text": text,
            "label": "xyz"[i % 3],
            "labels": "a|b" if i % 2 else "ac"[i % 3 > 0],
            "number": len(text),
            "q": text,
            "a": f"{text} one",
        }
        for i, text in enumerate(texts)
    ]
    Path(file).write_text("".join(json.dumps(line) + "\n" for line in lines))


TEXT = {"source": "text", "path": "own.jsonl", "text": "text"}
PAIRS = {"source": "pairs", "path": "own.jsonl", "anchor": "q", "positive": "a"}
CASES: dict[str, dict[str, Any]] = {
    "classes": {"data": TEXT | {"label": "label"}},
    "labels": {"data": TEXT | {"label": "labels", "delimiter": "|"}, "task": {"kind": "multi-label"}},
    "numbers": {"data": TEXT | {"label": "number"}, "task": {"kind": "regression"}},
    "groups": {"data": TEXT | {"label": "label"}, "task": {"kind": "similarity"}},
    "pairs": {"data": PAIRS, "task": {"kind": "similarity"}},
    "towers": {"data": PAIRS, "task": {"kind": "similarity"}, "towers": {"positive": {"layers": [8]}}},
    "tags": test_flow_words.TAGGED | {"data": {"source": "conll", "path": "own.conll"}},
    "answers": test_flow_words.ASKED | {"data": test_flow_words.ASKED["data"] | {"path": "own.json"}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_task_is_scored(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"backbone": f"hf:{text_folder}"},
        "preprocess": {"kind": "text", "image_size": None},
        "encode": {"cuts": [0.5]},
        "train": {"epochs": 3, "lr": 0.02},
        **CASES[case],
    }
    for seed, name in enumerate(("own", "new")):
        write_lines(f"{name}.jsonl", seed)
        test_flow_words.write_words(tmp_path, seed)
        Path("words.conll").rename(f"{name}.conll")
        Path("asked.json").rename(f"{name}.json")
    path = tiny.write_params(Path(), **settings)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"towers": settings.get("towers", {})}))
    made = Project.load(path)
    encode_project(made)
    run = train_project(made, "0.5")
    own, _ = evaluate_run(made, "0.5", split="validation", live=True)
    scores = {f"validation/{name}": value for name, value in own.cached.items()}
    assert scores == pytest.approx({name: run.history[run.best_epoch - 1][name] for name in scores}, abs=1e-6)
    assert own.largest_difference <= STORED * max(1, *map(abs, own.cached.values()))
    new, _ = evaluate_run(made, "0.5", str(Path(made.data.path).with_stem("new")), live=True)
    assert new.samples >= 60
    assert new.bad == 0
    assert new.largest_difference <= STORED * max(1, *map(abs, new.cached.values()))


def test_incomplete_pairs_are_left_out_and_told(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines("own.jsonl", 0)
    settings = {
        "data": PAIRS,
        "model": {"backbone": f"hf:{text_folder}"},
        "preprocess": {"kind": "text", "image_size": None},
        "task": {"kind": "similarity"},
        "encode": {"cuts": [0.5], "max_bad": 1},
    }
    made = Project.load(tiny.write_params(Path(), **settings))
    encode_project(made)
    train_project(made, "0.5")
    lines = [{"q": "one two", "a": "two"}, {"q": "", "a": "three"}, {"q": "bad", "a": "good"}]
    Path("new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, is_within = evaluate_run(made, "0.5", "new.jsonl")
    assert (found.samples, found.bad, is_within) == (4, 1, True)
    assert "1 samples are not scored: their pairs are incomplete" in caplog.text
    table = np.array([7, 7, 8, 8])
    rows = [np.array([0, 2]), np.array([3])]
    kept = list(_of_whole_pairs(table, [(one, torch.zeros(len(one), 2), {}) for one in rows]))
    assert [one.tolist() for one, _, _ in kept] == [[2], [3]]
    assert [len(output) for _, output, _ in kept] == [1, 1]


def test_scores_that_cannot_be_computed_are_told(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines("own.jsonl", 0)
    settings = {
        "data": TEXT | {"label": "label"},
        "model": {"backbone": f"hf:{text_folder}"},
        "preprocess": {"kind": "text", "image_size": None},
        "task": {"kind": "similarity"},
        "encode": {"cuts": [0.5]},
    }
    made = Project.load(tiny.write_params(Path(), **settings))
    encode_project(made)
    train_project(made, "0.5")
    lines = [{"text": "one two", "label": "x"}, {"text": "two", "label": "another"}]
    Path("new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = evaluate_run(made, "0.5", "new.jsonl", live=True)
    assert found.largest_difference is None
    assert "precision_at_1, reciprocal_rank, r_precision cannot be computed of these 2 samples" in caplog.text


def test_stored_samples_are_scored_without_the_layers_before_the_cut(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    save_file(tiny.ConvNet(3).state_dict(), "net.safetensors")
    made = project(model={"backbone": "tiny:conv_net", "weights": "net.safetensors"})
    encode_project(made)
    run = train_project(made, "0.5")
    Path("net.safetensors").unlink()
    assert evaluate_run(made, "0.5")[0].cached == run.test
    with pytest.raises(AbsentError, match="the layers before the cut too"):
        evaluate_run(made, "0.5", live=True)
