"""Runs that differ in some settings: made from one store, told apart, put together in the table."""

import importlib
import json
import linecache
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pipeline.config import parse_override
from pipeline.data import SampleTable
from pipeline.errors import ConfigError, DataError
from pipeline.project import Project
from pipeline.report.summary import table
from pipeline.runs.record import read_run
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An encoded project of one cut: 60 images."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    loaded = Project.load(tiny.write_params(tmp_path, encode={"cuts": [0.5]}))
    encode_project(loaded)
    return loaded


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("train.lr=0.001", "train.lr", 0.001),
        ("train.adapter={kind: lora, rank: 2}", "train.adapter", {"kind": "lora", "rank": 2}),
        ("data.split=", "data.split", None),
        ("model.options.a=b=c", "model.options.a", "b=c"),
    ],
)
def test_an_override_is_read_as_the_file_is(text: str, setting: str, value: object) -> None:
    assert parse_override(text) == (setting, value)


@pytest.mark.parametrize("text", ["train.lr", "lr=1", "train.=1", "=1", "train.lr={"])
def test_what_sets_nothing_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr|SECTION\.SETTING=VALUE"):
        parse_override(text)


def test_an_override_is_checked_as_the_file_is(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown setting \(did you mean epochs\?\)"):
        project.overridden({"train.epoch": 1})
    with pytest.raises(ConfigError, match=r"data\.fraction: 2: Input should be less than or equal to 1"):
        project.overridden({"data.fraction": 2})
    assert project.overridden({"model.options.width": 3}).model.options == {"width": 3}
    assert project.train.seed == 0


def test_seeds_share_a_row_and_settings_have_their_own(project: Project) -> None:
    made = [
        train_project(project.overridden(overrides), "0.5")
        for overrides in ({}, {"train.seed": 1}, {"train.seed": 2}, {"train.lr": 0.1}, {"data.fraction": 0.5})
    ]
    assert [run.name for run in made] == ["0.5", "0.5-1", "0.5-2", "0.5-0.1", "0.5-0.5"]
    assert [run.train_samples for run in made][::4] == [made[0].train_samples, round(made[0].train_samples / 2)]
    rows = {row.settings: row for row in report_project(project)}
    assert set(rows) == {"", "train.lr=0.1", "data.fraction=0.5"}
    seeds = [run.value for run in made[:3]]
    assert (rows[""].runs, rows[""].value, rows[""].spread) == (3, statistics.fmean(seeds), statistics.stdev(seeds))
    assert (rows["train.lr=0.1"].runs, rows["train.lr=0.1"].spread) == (1, None)
    assert "(3)" in table(list(rows.values()))
    assert table(list(rows.values()), markdown=True).startswith("| cut")


def test_a_run_of_other_settings_is_left_out(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    train_project(project, "0.5")
    train_project(project.overridden({"train.lr": 0.1}), "0.5")
    tiny.write_params(Path(), encode={"cuts": [0.5]}, train={"batch_size": 8})
    changed = Project.load(project.params)
    reason = "is left out: it has train.batch_size = 16, now it is 8; train it again, or set it back"
    with pytest.raises(DataError, match=rf"run 0\.5 {reason}\nrun 0\.5-0\.1 {reason}\n.*no run to report; train one"):
        report_project(changed)
    train_project(changed, "0.5")
    assert [row.settings for row in report_project(changed)] == [""]
    assert [record.message for record in caplog.records if "left out" in record.message] == [f"run 0.5-0.1 {reason}"]


def test_the_report_shows_what_it_has_and_names_the_rest(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_project(project, "0.5")
    train_project(project.overridden({"train.lr": 0.1}), "0.5")
    train_project(project.overridden({"train.seed": 1}), "0.5")
    written = Path("results/runs/0.5-1/run.json")
    old = json.loads(written.read_text())
    del old["made_of"]  # as earlier versions wrote it, with what they timed
    written.write_text(json.dumps(old | {"frozen_seconds_per_sample": 1.0}))
    assert [row.runs for row in report_project(project)] == [2, 1]
    caplog.clear()
    tiny.write_params(tmp_path, encode={"cuts": [0.5, 1.0]}, train={"head_lr": 0.1})
    more = Project.load(project.params)
    train_project(more, "0.5", "now")
    assert [row.runs for row in report_project(more)] == [1]
    said = {record.message for record in caplog.records if record.levelname == "WARNING"}
    assert {line for line in said if line.startswith(("run", "cuts"))} == {
        "run 0.5 is left out: it has train.head_lr = None, now it is 0.1; train it again, or set it back",
        "run 0.5-0.1 is left out: it has train.head_lr = None, now it is 0.1; train it again, or set it back",
        "run 0.5-1 is left out: it has other settings, samples or stores; train it again",
        "cuts without a run: 1.0; train them (dvc repro train)",
    }
    caplog.clear()
    tiny.write_params(tmp_path, encode={"cuts": [1.0]}, train={"head_lr": 0.1})
    with pytest.raises(DataError, match=r"run now is left out: its cut 0\.5 is not among encode\.cuts"):
        report_project(Project.load(project.params))


def test_a_report_without_the_costs_of_encode(project: Project) -> None:
    train_project(project, "0.5")
    Path("results/encode.json").unlink()
    (row,) = report_project(project)
    assert (row.speedup_over_frozen, row.break_even_epoch, row.state_bytes_per_sample) == (None, None, None)


def test_a_file_of_costs_that_a_kill_left_empty_is_written_anew(project: Project) -> None:
    Path("results/encode.json").write_text("")
    assert encode_project(project)
    assert json.loads(Path("results/encode.json").read_text())["cuts"]["0.5"]["samples"] == 60


def test_a_run_is_not_overwritten_by_one_of_other_settings_with_its_values(project: Project) -> None:
    first = train_project(project.overridden({"train.seed": 1}), "0.5")
    with pytest.raises(
        ConfigError, match=r"called 0\.5-1, .* sets train\.seed where this one sets data\.seed; .*--name"
    ):
        train_project(project.overridden({"data.seed": 1}), "0.5")
    assert read_run(project, "0.5-1") == first
    assert train_project(project.overridden({"data.seed": 1}), "0.5", "other").name == "other"
    assert train_project(project.overridden({"train.seed": 1}), "0.5").identity == first.identity


def test_what_another_version_wrote_is_left_out(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    train_project(project, "0.5")
    train_project(project.overridden({"train.lr": 0.1}), "0.5")
    old = Path("results/runs/0.5-0.1/run.json")
    old.write_text(json.dumps({"name": "0.5-0.1", "loss": 1.0}))
    assert [row.settings for row in report_project(project)] == [""]
    assert f"{old} cannot be read" in caplog.text
    assert "train the run again; it is left out" in caplog.text
    assert train_project(project.overridden({"train.lr": 0.1}), "0.5").name == "0.5-0.1"


def test_a_run_of_other_samples_is_left_out(project: Project) -> None:
    train_project(project, "0.5")
    Path("photos/circle/0000.png").rename("photos/square/1000.png")
    encode_project(project)
    with pytest.raises(
        DataError, match=r"run 0\.5 is left out: the samples, their labels or their splits have changed"
    ):
        report_project(project)


def test_a_run_of_other_code_of_one_s_own_is_left_out(project: Project, tmp_path: Path, monkeypatch: Any) -> None:
    """The task of docs/tasks.md, changed after training."""
    text = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    Path("my_task.py").write_text(code)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    kind = {"kind": "my_task:focal", "options": {"gamma": 1.5}}
    tiny.write_params(tmp_path, encode={"cuts": [0.5]}, task=kind, train={"epochs": 2})
    own = Project.load(project.params)
    run = train_project(own, "0.5")
    assert run.history[1]["train/loss"] < run.history[0]["train/loss"]
    assert [row.cut for row in report_project(own)] == [0.5]
    linecache.clearcache()
    Path("my_task.py").write_text(code.replace('"gamma", 2.0', '"gamma", 3.0'))
    monkeypatch.delitem(sys.modules, "my_task")
    importlib.invalidate_caches()
    with pytest.raises(DataError, match=r"run 0\.5 is left out: the code of your own network or task has changed"):
        report_project(own)


def test_a_run_is_exported_with_its_settings(project: Project, tmp_path: Path) -> None:
    fraction = project.overridden({"data.fraction": 0.1, "train.adapter": "lora", "train.epochs": 1})
    train_project(fraction, "0.5", "small")
    assert export_run(project, "small", tmp_path / "model").merged < 1e-5
    with pytest.raises(DataError, match=r"run large: .* does not exist; train it .*; finished runs: small"):
        read_run(project, "large")


def test_a_run_is_not_opened_as_another_model(project: Project, tmp_path: Path) -> None:
    train_project(project, "0.5")
    other = Project.load(tiny.write_params(Path(), encode={"cuts": [0.5]}, model={"options": {"wider": 2}}))
    with pytest.raises(DataError, match=r"run 0\.5 was trained with model\.options\.wider = .*absent.*; set it back"):
        export_run(other, "0.5", tmp_path / "model")
    slower = Project.load(tiny.write_params(Path(), encode={"cuts": [0.5]}, train={"lr": 0.001}))
    assert export_run(slower, "0.5", tmp_path / "model").merged < 1e-5


@pytest.mark.parametrize("name", ["", "..", "../0.5", "a/b", ".hidden", "a b", "-x"])
def test_a_name_is_no_path(project: Project, name: str) -> None:
    with pytest.raises(ConfigError, match="the run is called"):
        project.run_path(name)


def table_of(labels: list[str], *, groups: list[int] | None = None, held_out: int = 0) -> SampleTable:
    count = len(labels)
    keys = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    split = np.array(["validation"] * held_out + ["train"] * (count - held_out))
    targets = {"label": np.array(labels)} if groups is None else {"group": np.array([f"g{g}" for g in groups])}
    return SampleTable(keys, split, [str(i) for i in range(count)], targets)


def test_a_share_has_the_same_share_of_each_label() -> None:
    whole = table_of(["a"] * 100 + ["b"] * 40 + ["c"], held_out=10)
    part = whole.share(0.25, seed=3)
    training = part.targets["label"][part.rows("train")]
    assert Counter(training.tolist()) == {"a": round(90 * 0.25), "b": 10, "c": 1}
    assert len(part.rows("validation")) == 10
    assert len(part.source) == len(part.keys) == len(part)
    other = whole.share(0.25, seed=4)
    assert set(part.source) != set(other.source)
    assert set(part.source) < set(whole.share(0.5, seed=3).source)
    assert whole.share(1.0, seed=3) is whole


def test_a_share_parts_no_group() -> None:
    groups = [i // 4 for i in range(80)]
    part = table_of([""] * 80, groups=groups).share(0.5, seed=0)
    assert Counter(Counter(part.targets["group"].tolist()).values()) == {4: 10}
