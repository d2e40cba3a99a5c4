"""Augmented views from settings to an exported model: stored once, each by itself, and trained on in turn."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from pipeline.data import SampleTable
from pipeline.errors import ConfigError, MissingKeysError, StaleStoreError
from pipeline.keys import Recipe
from pipeline.models.images import decode
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.project.views import Views, rows_by_view
from pipeline.store import FORMAT, Reader, Resident, Store
from pipeline.train import order
from pipeline.train.loader import Loader, StoredRows, choose_source
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

AUGMENT = [{"RandomResizedCrop": {"size": 16, "scale": [0.5, 1.0]}}, "RandomHorizontalFlip"]
STORE = Path("data/activations/0.5")
N, COUNT = 30, 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with 36 images, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(12))
    return tmp_path


def project(views: int | None = 2, augment: Any = AUGMENT, **changes: dict[str, Any]) -> Project:
    changes["preprocess"] = {"augment": augment} | changes.get("preprocess", {})
    changes["encode"] = {"views": views, "cuts": [0.5]} | changes.get("encode", {})
    return Project.load(tiny.write_params(Path(), **changes))


def table() -> SampleTable:
    return SampleTable.read(Path("data/samples.parquet"))


def test_training_samples_lie_in_views_and_the_others_plain(folder: Path) -> None:
    assert encode_project(project())
    known = table()
    training, held_out = (
        {key.tobytes() for key in known.keys[(known.split == "train") == chosen]} for chosen in (True, False)
    )
    found = [Store.open(STORE / part).keys() for part in ("", "view-0", "view-1")]
    assert [{key.tobytes() for key in keys} for keys in found] == [held_out, training, training]
    assert len(held_out) > 3
    recipe = json.loads((STORE / "view-1/recipe.json").read_text())
    assert recipe["view"] == "view-1"
    assert recipe["preprocessing"]["augment"] == [AUGMENT[0], {"RandomHorizontalFlip": {}}]


def test_without_views_nothing_is_changed_by_what_views_are(folder: Path) -> None:
    encode_project(project())
    plain = json.loads((STORE / "recipe.json").read_text())
    encode_project(project(None, None))
    assert json.loads((STORE / "recipe.json").read_text()) == plain
    assert plain["view"] is None
    assert "augment" not in plain["preprocessing"]
    assert len(Store.open(STORE).keys()) == 36


@pytest.mark.parametrize("change", [{"workers": 2}, {"cuts": [0, 0.5]}])
def test_the_same_views_again_are_the_same_bytes(folder: Path, change: dict[str, Any]) -> None:
    encode_project(project())
    before = tiny.files(STORE)
    shutil.rmtree("data/activations")
    torch.manual_seed(99)
    encode_project(project(encode=change))
    assert tiny.files(STORE) == before


def test_views_do_not_depend_on_batches_segments_or_the_order_of_samples(folder: Path) -> None:
    """At the cut 0 the state is the input itself, sample by sample."""

    def states() -> dict[tuple[bytes, int], bytes]:
        found = {}
        for number in range(2):
            store = Store.open(Path(f"data/activations/0/view-{number}"))
            read = Reader(store.path).gather(store.rows(store.keys()))["state.x"]
            found |= {(key.tobytes(), number): one.numpy().tobytes() for key, one in zip(store.keys(), read)}  # noqa: B905
        return found

    encode_project(project(encode={"cuts": [0]}))
    before = states()
    assert len(set(before.values())) == len(before) == 2 * len(table().rows("train"))
    shutil.rmtree("data/activations")
    for name in ("circle", "stripe"):
        Path("photos", name).rename(Path("photos", f"renamed-{name}"))
    encode_project(project(encode={"cuts": [0], "batch_size": 3, "segment_samples": 7}))
    assert states() == before


def test_another_view_encodes_only_itself_and_fewer_cost_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="recycle")
    encode_project(project(2))
    before = tiny.files(STORE)
    training = len(table().rows("train"))
    for views, new in ((3, training), (3, 0), (1, 0), (3, 0)):
        caplog.clear()
        encode_project(project(views))
        assert [record.args[1] for record in caplog.records if "encoded" in record.msg] == [new]
    after = tiny.files(STORE)
    assert before.items() < after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"view-2"}
    shutil.rmtree("data/activations")
    encode_project(project(3))
    assert tiny.files(STORE) == after


def test_other_views_concern_training(folder: Path) -> None:
    """Fewer views change no store, but dvc.yaml's `train` depends on the sample table, too."""
    written = {}
    for views in (2, 1):
        encode_project(project(views))
        written[views] = Path("data/samples.parquet").read_bytes()
        assert table().views == table().share(0.5, 0).views == views
    assert written[1] != written[2]
    encode_project(project(2))
    assert Path("data/samples.parquet").read_bytes() == written[2]
    encode_project(project(None, None))
    assert table().views is None


def test_a_file_is_decoded_once_for_all_views_and_cuts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[bytes] = Counter()

    def counted(content: bytes) -> torch.Tensor:
        decoded[content] += 1
        return decode(content)

    monkeypatch.setattr("pipeline.models.images.decode", counted)
    encode_project(project(3, encode={"cuts": [0, 0.5]}))
    assert len(decoded) == 36
    assert decoded.total() <= 36 + 4, "the samples on which a split is proved are decoded before"


def test_views_that_a_kill_left_unequal_are_finished(folder: Path) -> None:
    encode_project(project(3, encode={"segment_samples": 7}))
    whole = tiny.files(STORE)
    for view, keep in ((0, 1), (2, 2)):
        for segment in Store.open(STORE / f"view-{view}").segments()[keep:]:
            shutil.rmtree(STORE / f"view-{view}" / segment)
    encode_project(project(3, encode={"segment_samples": 7}))
    assert tiny.files(STORE) == whole


def test_a_sample_that_moves_to_validation_is_encoded_plain(folder: Path) -> None:
    encode_project(project())
    few = len(table().rows("train"))
    encode_project(project(data={"validation": 0.6}))
    assert len(table().rows("train")) < few
    train_project(project(data={"validation": 0.6}, train={"epochs": 1}), "0.5")


def test_a_content_in_two_splits_is_stored_for_both(folder: Path) -> None:
    keys = np.eye(5, 16, dtype=np.uint8)
    known = SampleTable(keys[[0, 1, 2, 0]], np.array(["train"] * 3 + ["validation"]), list("abcd"), {})
    plain, augmented = rows_by_view(keys, known)
    assert (plain.tolist(), augmented.tolist()) == ([0], [0, 1, 2])


def test_a_bad_image_is_set_aside_once(folder: Path) -> None:
    for name in ("circle/0001.png", "square/0002.png", "stripe/0003.png"):
        Path("photos", name).write_bytes(tiny.draw(1, 2)[:-40] + name.encode())
    assert not encode_project(project())
    assert len(Path("data/quarantine.csv").read_text().splitlines()) == 4
    assert len(table()) == 33
    train_project(project(train={"epochs": 1}), "0.5")


def test_an_image_that_cannot_be_augmented_is_set_aside(folder: Path) -> None:
    known = Project.load(tiny.write_params(folder, encode={"cuts": [0.5]}))
    encode_project(known)
    name = table().source[int(table().rows("train")[0])]
    Path("photos", name).write_bytes(tiny.draw(0, 999, size=18))
    settings = project(augment=[{"RandomCrop": {"size": 20}}], data={"validation": 0.0})
    assert not encode_project(settings)
    (row,) = csv.DictReader(Path("data/quarantine.csv").read_text().splitlines())
    assert row["source"] == name
    assert row["reason"].startswith("RandomCrop cannot be used on an image")
    assert len(table()) == 35


@pytest.mark.parametrize("how", ["cycle", "random"])
def test_train_report_and_export(folder: Path, how: str) -> None:
    settings = project(2, train={"epochs": 3, "views": how})
    encode_project(settings)
    run = train_project(settings, "0.5")
    weights = Path("results/runs/0.5/model.safetensors").read_bytes()
    assert len(run.history) == 3
    train_project(settings, "0.5")
    assert Path("results/runs/0.5/model.safetensors").read_bytes() == weights
    (row,) = report_project(settings)
    costs = json.loads(Path("results/encode.json").read_text())["cuts"]["0.5"]
    states = 36 + len(table().rows("train"))
    assert (costs["samples"], costs["measured"]["samples"]) == (36, states)
    assert row.state_bytes_per_sample > states / 36 * 8 * 16 * 16 * 2
    parity = export_run(settings, "0.5", folder / "model")
    assert parity.samples == 32
    assert "augment" not in json.loads((folder / "model/backbone.json").read_text())["preprocess"]


def test_an_export_is_proved_on_the_views_where_nothing_is_held_out(folder: Path) -> None:
    settings = project(1, data={"validation": 0.0})
    encode_project(settings)
    train_project(settings, "0.5")
    assert not len(Store.open(settings.store_path(0.5)).keys())
    assert export_run(settings, "0.5", folder / "model").stored < 1e-2


def test_other_settings_than_the_views_were_made_with_are_noticed(folder: Path) -> None:
    encode_project(project())
    with pytest.raises(StaleStoreError, match=r"view-0 was encoded with preprocessing\.augment = .*RandomHorizontal"):
        train_project(project(augment=AUGMENT[:1]), "0.5")
    with pytest.raises(StaleStoreError, match=r"preprocessing\.image_size = 16, expected 20"):
        train_project(project(preprocess={"image_size": 20}), "0.5")
    with pytest.raises(ConfigError, match=r"there is no store at data/activations/0.5/view-2; encode it"):
        train_project(project(3), "0.5")
    with pytest.raises(MissingKeysError, match="encode them"):
        train_project(project(None, None), "0.5")
    plain = {name: data for name, data in tiny.files(STORE).items() if not name.startswith("view")}
    encode_project(project(augment=AUGMENT[:1]), replace_stores=True)
    train_project(project(augment=AUGMENT[:1], train={"epochs": 1}), "0.5")
    assert plain.items() <= tiny.files(STORE).items(), "held-out samples are not encoded again"


@pytest.mark.parametrize(
    ("views", "augment", "train", "fault"),
    [
        (None, AUGMENT, "cycle", r"preprocess\.augment is set, but encode\.views is not.*set encode\.views"),
        (2, None, "cycle", r"encode\.views is 2, but preprocess\.augment is not set.*set preprocess\.augment"),
        (None, None, "random", r"train\.views is 'random', but there are no views; set encode\.views"),
    ],
)
def test_settings_that_contradict_each_other(folder: Path, views: Any, augment: Any, train: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        project(views, augment, train={"views": train})


def stored(path: Path) -> Views:
    """Sample i, plain, is i; in view v it is i + 100 (v + 1). The last 10 of 30 are held out."""
    keys, in_views = sample_keys(), np.arange(N) < 20
    plain = Store.create(path, Recipe(FORMAT, "w", "a", "cut", {}, None, "float32", "raw:float32"))
    plain.write_segment(keys[20:], {"state.x": np.arange(20, N, dtype=np.float32)[:, None]})
    augmented = []
    for view in range(COUNT):
        recipe = Recipe(FORMAT, "w", "a", "cut", {}, f"view-{view}", "float32", "raw:float32")
        augmented.append(Store.create(path / f"view-{view}", recipe))
        for begin in (0, 12):
            rows = np.arange(begin, min(begin + 12, 20))
            values = rows + 100.0 * (view + 1)
            augmented[-1].write_segment(keys[rows], {"state.x": values[:, None].astype(np.float32)})
    return Views(plain, augmented, keys, in_views)


def sample_keys() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 16), dtype=np.uint8)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("how", ["cycle", "random"])
def test_an_epoch_takes_its_views(tmp_path: Path, resident: bool, how: order.ViewOrder) -> None:
    views = stored(tmp_path / "store")

    def view(epoch: int) -> np.ndarray:
        return order.views(N, views.count, seed=5, epoch=epoch, how=how)

    def batches(epoch: int) -> list[np.ndarray]:
        return order.batches(np.arange(N), 7, seed=5, epoch=epoch, shuffle=True)

    reader = Reader(views.path)
    source = Resident(reader, views.places, torch.device("cpu")) if resident else reader
    loader = Loader(StoredRows(views.places, source, COUNT), {}, batches, view=view)
    for epoch in (0, 1, 2, 4, 1):
        loader.set_epoch(epoch)
        seen = [(batch.rows.numpy(), batch.state["x"][:, 0].numpy()) for batch in loader]
        rows, values = (np.concatenate(part) for part in zip(*seen, strict=True))
        assert sorted(rows) == list(range(N))
        np.testing.assert_array_equal(values, rows + np.where(rows < 20, 100 * (view(epoch)[rows] + 1), 0))
        if how == "cycle":
            assert set(values[rows < 20] // 100) == {epoch % COUNT + 1}


def test_an_iteration_that_has_begun_keeps_its_epoch(tmp_path: Path) -> None:
    views = stored(tmp_path / "store")
    samples = StoredRows(views.places, Reader(views.path), COUNT)
    loader = Loader(samples, {}, [np.array([0]), np.array([1])], view=lambda epoch: np.full(N, epoch))
    batches = iter(loader)
    next(batches)
    loader.set_epoch(2)
    assert next(batches).state["x"].item() == 101
    assert next(iter(loader)).state["x"].item() == 300


def test_residence_counts_all_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = stored(tmp_path / "store")
    needed = 4 * (10 + 20 * COUNT)
    assert Resident.nbytes(Reader(views.path), views.places) == needed
    for free, expected in ((2 * needed, Resident), (2 * needed - 1, Reader)):
        monkeypatch.setattr("pipeline.train.loader.free_memory", lambda device, free=free: free)
        assert type(choose_source(views.places, Reader(views.path), torch.device("meta"))) is expected


def test_a_sample_that_a_view_lacks_is_named(tmp_path: Path) -> None:
    views = stored(tmp_path / "store")
    shutil.rmtree(views.augmented[1].path / views.augmented[1].segments()[0])
    views.augmented[1].refresh()
    with pytest.raises(MissingKeysError, match="of 20 samples were never encoded"):
        _ = views.places


def test_with_every_view_there_no_model_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"backbone": "torchvision:squeezenet1_1", "weights": None}

    def settings(views: int) -> Project:
        return project(views, model=model, preprocess={"image_size": 32})

    encode_project(settings(2))
    before = tiny.files(Path("data/activations"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(LoadedModel, "open", refuse)
    assert encode_project(settings(2))
    assert tiny.files(Path("data/activations")) == before
    with pytest.raises(AssertionError, match="a model is built"):
        encode_project(settings(3))
    shutil.rmtree(next(path for path in (STORE / "view-1").iterdir() if path.is_dir()))
    with pytest.raises(AssertionError, match="a model is built"):
        encode_project(settings(2))
