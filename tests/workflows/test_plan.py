"""`recycle plan`: predictions against a real encode, what it leaves on disk, what it names, and what it recommends."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from click.testing import CliRunner

from pipeline.errors import DataError
from pipeline.project import Project
from pipeline.report.costs import read_costs
from pipeline.report.forecast import read_forecast
from pipeline.workflows import plan
from pipeline.workflows.encode import encode_project
from pipeline.workflows.plan import Plan, apply_settings, plan_project
from pipeline.workflows.plan_text import text
from pipeline.workflows.train import train_project
from pipeline.workflows.trials import cuts, encode, epochs, network, settings
from stages.cli import recycle

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "TRAIN_SECONDS", 0.02)
    monkeypatch.setattr(network, "SECONDS_EACH", 0.01)
    monkeypatch.setattr(cuts, "FEWEST_SAMPLES", 1024)  # however slow the machine


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ninety photos of three classes in the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(30))
    return tmp_path


@pytest.fixture
def texts(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of one to twenty words, of which the network takes sixteen tokens, and pairs of them."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS, draw.integers(1, 20))) for _ in range(200)]
    labelled = [{"text": line, "label": "good" if "good" in line else "other"} for line in lines]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    distinct = list(dict.fromkeys(lines))
    pairs = [{"q": a, "a": b} for a, b in zip(distinct[::2], distinct[1::2], strict=False)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    for file in text_folder.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))  # so that its stamp is settled
    return tmp_path


def of_images(folder: Path, **changes: dict[str, object]) -> Project:
    return Project.load(tiny.write_params(folder, **changes))


def of_texts(folder: Path, **changes: Any) -> Project:
    given: dict[str, dict[str, object]] = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": f"hf:{folder / 'bert'}"},
        "preprocess": {"kind": "text", "image_size": None, "max_length": 12},
    }
    names = given.keys() | changes.keys()
    return Project.load(tiny.write_params(folder, **{n: given.get(n, {}) | changes.get(n, {}) for n in names}))


def of_towers(folder: Path) -> Project:
    data = {"source": "pairs", "path": "pairs.jsonl", "anchor": "q", "positive": "a", "text": None, "label": None}
    project = of_texts(folder, data=data, task={"kind": "similarity"}, train={"batch_size": 8})
    settings = yaml.safe_load(project.params.read_text())
    towers = {"anchor": {"model": {"backbone": f"hf:{folder / 'bert'}"}}, "positive": {"cut": 1.0}}
    project.params.write_text(yaml.safe_dump(settings | {"towers": towers}))
    return Project.load(project.params)


def state_bytes(project: Project) -> dict[str, int]:
    """The bytes of the states of each cut, in all views and towers."""
    stores = {
        str(cut): [part.open_store(part.at(cut), view) for part in project.parts for view in part.views]
        for cut in project.encode.cuts
    }
    return {cut: sum(store.nbytes() for store in of_cut) for cut, of_cut in stores.items()}


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


AUGMENTED: dict[str, Any] = {
    "preprocess": {"augment": ["RandomHorizontalFlip"]},
    "encode": {"cuts": [0.5], "views": 2},
}


@pytest.mark.parametrize("kind", ["images", "views", "texts", "towers"])
def test_bytes_are_those_of_the_encode_that_follows(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("images" if kind in ("images", "views") else "texts")
    made = {
        "images": of_images,
        "views": lambda one: of_images(one, **AUGMENTED),
        "texts": of_texts,
        "towers": of_towers,
    }
    project = made[kind](folder)
    before = entries(folder)
    found = plan_project(project)
    left = {name for name in entries(folder) - before if not name.startswith((".recycle/plan/", ".recycle/keys"))}
    assert left == {"results/plan.json"}
    assert encode_project(project)
    assert {str(cut.cut): cut.state_bytes for cut in found.cuts.forecast.cuts} == state_bytes(project)
    costs = read_costs(project)
    for cut in found.cuts.forecast.cuts:
        assert cut.epoch_seconds is not None, cut.reason
        assert cut.encode_seconds > 0
        assert cut.frozen_seconds > 0 or not cut.recycled
        assert costs[str(cut.cut)].state_bytes_per_sample == pytest.approx(cut.state_bytes / cut.samples)
    stored = [path for path in project.activations.rglob("*") if path.is_file() and path.name != "recipe.json"]
    assert found.cuts.forecast.total_bytes == sum(path.stat().st_size for path in stored)
    assert "break-even/frozen" in text(found, runs=1, applied=False)


def test_bytes_of_a_data_set_from_a_part_of_it(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "MOST_SAMPLES", 64)
    monkeypatch.setattr(cuts, "FEWEST_SAMPLES", 64)
    project = of_texts(texts, encode={"segment_samples": 32})
    found = plan_project(project)
    assert found.cuts.forecast.samples_tried < 120
    encode_project(project)
    measured = state_bytes(project)
    for cut in found.cuts.forecast.cuts:
        assert cut.state_bytes == pytest.approx(measured[str(cut.cut)], rel=0.02)


def test_what_was_measured_is_used_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = of_texts(texts)
    first = plan_project(project)
    assert first.cuts.cut_off > 0
    assert "longer than preprocess.max_length" in text(first, runs=1, applied=False)
    monkeypatch.setattr(plan, "measure_cuts", None)
    monkeypatch.setattr(plan, "TrialNetwork", None)
    again = plan_project(project)
    assert (again.settings, again.cuts, again.data) == (first.settings, first.cuts, first.data)
    with pytest.raises(TypeError, match="NoneType"):
        plan_project(of_texts(texts, train={"batch_size": 4}))


def test_the_data_is_described(images: Path) -> None:
    twin = images / "photos" / "square" / "0003.png"
    shutil.copy(images / "photos" / "circle" / "0001.png", twin)
    (images / "photos" / "stripe" / "0002.png").write_bytes(b"no image")
    found = plan_project(of_images(images))
    assert found.data.samples == 90
    assert sum(found.data.splits.values()) == 90
    assert found.data.labels == {"label": 3}
    assert "stripe/0002.png" in found.data.unreadable
    assert any("circle/0001.png = square/0003.png" in remark for remark in found.data.remarks)


def test_a_failure_leaves_nothing(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "encode_views", fail)
    with pytest.raises(OSError, match="No space"):
        plan_project(of_images(images))
    assert not list((images / ".recycle").glob(".tmp*"))
    assert not (images / "data").exists()


def test_nothing_can_be_read(images: Path) -> None:
    for file in (images / "photos").rglob("*.png"):
        file.write_bytes(file.name.encode() + bytes([len(file.parent.name)]))
    with pytest.raises(DataError, match="none of 90 samples can be decoded"):
        plan_project(of_images(images))


def test_training_that_cannot_be_tried_is_named(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECONDS", -1.0)
    found = plan_project(of_images(images))
    assert {cut.epoch_seconds for cut in found.cuts.forecast.cuts} == {None}
    shown = text(found, runs=1, applied=False)
    assert "the time was up" in shown
    assert "unknown: " in shown


def slow_bfloat16(monkeypatch: pytest.MonkeyPatch, factors: dict[str, float]) -> None:
    """Have trials in some precision take a share of the time of others."""

    def seconds(_: object, form: Any, count: int) -> float:
        return count * factors.get(form.precision, 1.0)

    monkeypatch.setattr(settings.TrialNetwork, "seconds", seconds)
    monkeypatch.setattr(settings, "is_emulated", lambda *_: False)


@pytest.mark.parametrize(
    ("factors", "chosen"),
    [
        ({}, None),
        ({"bfloat16": 0.9}, None),
        ({"bfloat16": 0.4}, "bfloat16"),
        ({"bfloat16": 0.40, "float16": 0.42}, "float16"),  # nearly as fast, and more exact
    ],
)
def test_precision_is_lowered_where_it_pays(
    images: Path, monkeypatch: pytest.MonkeyPatch, factors: dict[str, float], chosen: str | None
) -> None:
    slow_bfloat16(monkeypatch, factors)
    found = plan_project(of_images(images)).settings
    assert found.recommended.get("model.dtype") == chosen
    assert all(trial.state_mean is not None and trial.state_mean < 0.05 for trial in found.trials)
    assert (found.trials[0].state_mean, found.trials[0].output_mean) == (0, 0)
    assert bool(found.reasons) == (chosen is not None)


def test_precision_that_deviates_is_refused(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_bfloat16(monkeypatch, {"bfloat16": 0.4, "float16": 0.4})
    monkeypatch.setattr(settings, "LARGEST_DEVIATION", 1e-9)
    found = plan_project(of_images(images)).settings
    assert not found.recommended
    assert any("bfloat16: not recommended" in note for note in found.notes)


def test_apply_keeps_comments_and_predicts_for_what_it_writes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_bfloat16(monkeypatch, {"bfloat16": 0.4})
    project = of_images(images)
    project.params.write_text("# ours\n" + project.params.read_text() + "# the end\n")
    result = CliRunner().invoke(recycle, ["plan", "--apply"])
    assert result.exit_code == 0, result.output
    assert "written to the file of settings" in result.output
    written = project.params.read_text()
    assert written.startswith("# ours\n")
    assert written.endswith("# the end\n")
    now = Project.load(project.params)
    assert (now.model.dtype, now.encode.precision) == ("bfloat16", "bfloat16")
    assert read_forecast(now) is not None
    assert read_forecast(project) is None, "the settings before are others"
    again = CliRunner().invoke(recycle, ["plan", "--json"])
    assert json.loads(again.stdout)["settings"]["recommended"] == {}


def test_settings_are_replaced_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(
        "# top\nmodel:\n  backbone: 'timm:x' # quoted\nencode:\n  cuts: [0, 0.5] # two\n  views: null # none\n"
        "preprocess:\n  augment:\n    - A: {size: [1, 2]}\n    - B\n"
    )
    apply_settings(file, {"encode.batch_size": 16, "model.dtype": "float16", "encode.batch_tokens": None})
    assert file.read_text() == (
        "# top\nmodel:\n  backbone: 'timm:x' # quoted\n  dtype: float16\nencode:\n  cuts: [0, 0.5] # two\n"
        "  views: null # none\n  batch_size: 16\n  batch_tokens: null\n"
        "preprocess:\n  augment:\n    - A: {size: [1, 2]}\n    - B\n"
    )


def test_report_shows_predictions_beside_measurements(images: Path) -> None:
    project = of_images(images, train={"epochs": 1}, encode={"cuts": [1.0]})
    plan_project(project)
    encode_project(project)
    train_project(project, "1.0")
    result = CliRunner().invoke(recycle, ["report"])
    assert result.exit_code == 0, result.output
    table = result.output.partition("predicted by recycle plan / measured")[2]
    nbytes = state_bytes(project)["1.0"] / 90
    assert f"{nbytes:,.0f} / {nbytes:,.0f}" in table


def test_a_full_disk_is_told(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    found: Plan = plan_project(of_images(images))
    shown = text(found, runs=1, applied=False)
    assert shown.count("do not cache: it takes") == 3
    assert "the disk does not suffice" in shown
