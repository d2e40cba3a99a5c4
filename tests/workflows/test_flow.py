"""The three stages on real files, called as the command line calls them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from pipeline.data import SampleTable
from pipeline.errors import ConfigError, DataError, StaleStoreError
from pipeline.project import Project
from pipeline.store import Store
from pipeline.workflows.encode import encode_project
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with 60 images, in the current directory."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny.write_images(tmp_path / "photos", range(20))
    tiny.write_params(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


def project(folder: Path, **changes: dict[str, object]) -> Project:
    return Project.load(tiny.write_params(folder, **changes))


def encoded(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Samples encoded for each cut, as the last run said."""
    said = [record.args for record in caplog.records if "samples encoded" in record.msg]
    caplog.clear()
    return [int(args[1]) for args in said if isinstance(args, tuple)]


def test_from_images_to_a_table(folder: Path) -> None:
    assert encode_project(project(folder))
    for cut in ("0", "0.5", "1.0"):
        run = train_project(project(folder), cut)
        weights = {name for name in tiny.files(folder / "results/runs" / cut) if name.endswith("safetensors")}
        assert weights == {"model.safetensors"}
        assert [row["train/loss"] > 0 for row in run.history] == [True, True]
    rows = report_project(project(folder))
    assert [row.recycled for row in rows] == [0, 0.5, 1.0]
    written = json.loads((folder / "results/summary.json").read_text())
    assert set(written[1]) == {
        "cut",
        "settings",
        "recycled",
        "metric",
        "runs",
        "value",
        "spread",
        "test",
        "test_spread",
        "kept",
        "untrained",
        "state_bytes_per_sample",
        "encode_seconds",
        "train_seconds_per_epoch",
        "epochs",
        "speedup_over_full",
        "speedup_over_frozen",
        "break_even_epoch",
        "bounded",
    }
    assert (folder / "results/runs.png").stat().st_size > 1000
    costs = json.loads((folder / "results/encode.json").read_text())["cuts"]
    flops = {
        cut: (cost["flops_per_sample"]["before"], cost["flops_per_sample"]["after"]) for cut, cost in costs.items()
    }
    # Convolutions of 3 x 3 on 16 x 16 from 3, 8, 8 and 12 channels, and a linear layer: two operations per product.
    first, second, third, fourth = (2 * 9 * 256 * ins * outs for ins, outs in pairwise((3, 8, 8, 12, 12)))
    total = first + second + third + fourth + 2 * 12 * 3
    assert flops["0"] == (0, total)
    assert flops["0.5"] == (first + second, total - first - second)
    assert flops["1.0"] == (total - 2 * 12 * 3, 2 * 12 * 3)
    assert (rows[0].speedup_over_frozen, rows[0].break_even_epoch) == (1.0, None)
    trained = len(SampleTable.read(Path("data/samples.parquet")).rows("train"))
    timed = costs["0.5"]["measured"]["seconds_per_sample"]["forward"] * trained
    if "speedup_over_frozen" not in rows[1].bounded:
        assert rows[1].speedup_over_frozen == pytest.approx(1 + timed / rows[1].train_seconds_per_epoch)
    encode_project(project(folder))  # nothing is to do, and what was counted is kept
    assert json.loads((folder / "results/encode.json").read_text())["cuts"] == costs
    assert not list((folder / ".recycle/checkpoints").iterdir())


def test_nothing_is_encoded_twice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    encode_project(project(folder))
    assert encoded(caplog) == [60, 60, 60]
    before = tiny.files(folder / "data/activations")
    encode_project(project(folder))
    assert encoded(caplog) == [0, 0, 0]
    assert tiny.files(folder / "data/activations") == before


def test_ten_more_images_encode_ten_and_leave_what_was(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    encode_project(project(folder))
    before, table = tiny.files(folder / "data/activations"), SampleTable.read(folder / "data/samples.parquet")
    encoded(caplog)
    for seed in range(100, 110):
        (folder / "photos/square" / f"{seed}.png").write_bytes(tiny.draw(1, seed))
    encode_project(project(folder))
    assert encoded(caplog) == [10, 10, 10]
    after, more = tiny.files(folder / "data/activations"), SampleTable.read(folder / "data/samples.parquet")
    assert before.items() < after.items()
    costs = json.loads((folder / "results/encode.json").read_text())["cuts"]["0.5"]
    assert (costs["samples"], costs["measured"]["samples"]) == (70, 60)
    split = dict(zip(more.source, more.split, strict=True))
    assert all(split[name] == where for name, where in zip(table.source, table.split, strict=True))


def test_a_new_cut_encodes_only_itself(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    encode_project(project(folder, encode={"cuts": [0.5]}))
    encoded(caplog)
    encode_project(project(folder, encode={"cuts": [0.5, 0.75]}))
    assert encoded(caplog) == [0, 60]


def test_a_corrected_label_encodes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    encode_project(project(folder))
    encoded(caplog)
    (folder / "photos/square/0003.png").rename(folder / "photos/circle/was-no-square.png")
    encode_project(project(folder))
    assert encoded(caplog) == [0, 0, 0]
    table = SampleTable.read(folder / "data/samples.parquet")
    labels = dict(zip(table.source, table.targets["label"].tolist(), strict=True))
    assert labels["circle/was-no-square.png"] == "circle"


def test_identical_samples_are_stored_once(folder: Path) -> None:
    shutil.copy(folder / "photos/square/0003.png", folder / "photos/square/again.png")
    encode_project(project(folder))
    assert len(Store.open(folder / "data/activations/0.5").keys()) == 60
    assert len(SampleTable.read(folder / "data/samples.parquet")) == 61


def test_several_cuts_in_one_pass_give_the_bytes_of_one_at_a_time(folder: Path) -> None:
    encode_project(project(folder))
    together = tiny.files(folder / "data/activations")
    shutil.rmtree(folder / "data/activations")
    for cut in (0, 0.5, 1.0):
        encode_project(project(folder, encode={"cuts": [cut]}))
    assert tiny.files(folder / "data/activations") == together


def test_worker_processes_give_the_same_bytes(folder: Path) -> None:
    encode_project(project(folder))
    without = tiny.files(folder / "data/activations")
    shutil.rmtree(folder / "data/activations")
    encode_project(project(folder, encode={"workers": 2}))
    assert tiny.files(folder / "data/activations") == without


def test_a_store_of_other_settings_is_never_trained_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encode_project(project(folder))
    other = {"kind": "image", "image_size": 20}
    with pytest.raises(StaleStoreError, match=r"preprocessing\.(image_)?size = 16, expected 20"):
        train_project(project(folder, preprocess=other), "0.5")
    with pytest.raises(StaleStoreError, match="weights"):
        train_project(project(folder, model={"backbone": "tiny:conv_net", "seed": 1}), "0.5")
    caplog.set_level("INFO", logger="recycle")
    caplog.clear()
    encode_project(project(folder, preprocess=other), replace_stores=True)
    assert encoded(caplog) == [60, 60, 60]
    train_project(project(folder, preprocess=other), "0.5")


def test_no_store_is_replaced_unasked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encode_project(project(folder))
    before = tiny.files(folder / "data"), tiny.files(folder / "results")
    other = {"kind": "image", "image_size": 20}
    with pytest.raises(StaleStoreError) as refused:
        encode_project(project(folder, preprocess=other))
    told = str(refused.value)
    for cut in ("0", "0.5", "1.0"):
        assert f"data/activations/{cut} was encoded with preprocessing.image_size = 16, expected 20 (0." in told
    assert "recycle encode --replace" in told
    assert (tiny.files(folder / "data"), tiny.files(folder / "results")) == before
    encode_project(project(folder))
    assert (tiny.files(folder / "data"), tiny.files(folder / "results")) == before
    made = project(folder, preprocess=other, encode={"replace": True})
    encode_project(made)
    assert "image_size = 16, expected 20 (0.1 MB); it is replaced" in caplog.text
    encode_project(made)


def test_a_store_without_samples_is_nobodys_loss(folder: Path) -> None:
    made = project(folder)
    encode_project(made)
    for cut in made.encode.cuts:
        store = Store.open(made.store_path(cut))
        for segment in store.segments():
            shutil.rmtree(store.path / segment)
    encode_project(project(folder, preprocess={"kind": "image", "image_size": 20}))


def test_a_cut_without_a_store_names_the_remedy(folder: Path) -> None:
    encode_project(project(folder, encode={"cuts": [0.5]}))
    with pytest.raises(ConfigError, match=r"there is no store at data/activations/1\.0; encode it"):
        train_project(project(folder), "1.0")
    with pytest.raises(DataError, match=r"results/runs has no run to report; train one"):
        report_project(project(folder))


def test_corrupt_files_are_set_aside_and_the_rest_is_stored(folder: Path) -> None:
    (folder / "photos/square/0001.png").write_bytes(b"")
    (folder / "photos/square/0002.png").write_bytes(tiny.draw(1, 2)[:-40])
    (folder / "photos/circle/0002.png").write_bytes(b"not an image at all")
    assert not encode_project(project(folder))
    assert encode_project(project(folder, encode={"max_bad": 3}))
    assert encode_project(project(folder, encode={"max_bad": 0.05}))
    lines = (folder / "data/quarantine.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["circle/0002.png", "square/0001.png", "square/0002.png"]
    assert len(Store.open(folder / "data/activations/0.5").keys()) == 57
    assert len(SampleTable.read(folder / "data/samples.parquet")) == 57
    (folder / "photos/square/0001.png").write_bytes(tiny.draw(1, 1))
    encode_project(project(folder))
    assert len(Store.open(folder / "data/activations/0.5").keys()) == 58


def test_a_state_that_is_not_finite_is_set_aside(folder: Path) -> None:
    data = {"source": "tiny:Poisoned", "path": None, "options": {"rows": 30}}
    model = {"backbone": "tiny:logarithmic"}
    settings = project(folder, data=data, model=model, preprocess={"kind": "array", "image_size": None})
    assert not encode_project(settings)
    reasons = (folder / "data/quarantine.csv").read_text()
    assert "row 5,,the disk has a hole here" in reasons
    assert "its state holds NaN or infinity" in reasons
    assert len(Store.open(folder / "data/activations/0.5").keys()) == 28


def test_a_state_beyond_float16_is_stored_as_bfloat16(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="recycle")
    encode_project(project(folder, model={"backbone": "tiny:overflowing"}, encode={"cuts": [0.5]}))
    assert any("beyond float16" in record.msg for record in caplog.records)
    run = train_project(project(folder, model={"backbone": "tiny:overflowing"}), "0.5")
    assert np.isfinite(run.history[-1]["train/loss"])


def test_training_is_the_same_every_time(folder: Path) -> None:
    encode_project(project(folder))
    first = train_project(project(folder), "0.5")
    weights = (folder / "results/runs/0.5/model.safetensors").read_bytes()
    second = train_project(project(folder), "0.5")
    assert weights == (folder / "results/runs/0.5/model.safetensors").read_bytes()
    assert [row["train/loss"] for row in first.history] == [row["train/loss"] for row in second.history]


def test_without_validation_samples_a_run_ends_with_its_last_epoch(folder: Path) -> None:
    settings = project(folder, data={"validation": 0.0})
    encode_project(settings)
    run = train_project(settings, "0.5")
    assert run.best_epoch == 2
    assert np.isnan(run.value)
    assert (folder / "results/runs/0.5/model.safetensors").exists()


def test_patience_stops_training(folder: Path) -> None:
    encode_project(project(folder))
    settings = project(folder, train={"epochs": 30, "batch_size": 16, "lr": 1e-12, "patience": 2})
    assert len(train_project(settings, "0.5").history) == 3


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_store_of_links_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture, link: Callable[[Path, Path], None]
) -> None:
    encode_project(project(folder, encode={"cuts": [1.0]}))
    store = folder / "data/activations/1.0"
    copied = shutil.copytree(store, folder / "cache")
    for file in [path for path in store.rglob("*") if path.is_file()]:
        file.unlink()
        link(copied / file.relative_to(store), file)
    train_project(project(folder, encode={"cuts": [1.0]}), "1.0")
    assert "DVC copies the whole store before each encode" in caplog.text
