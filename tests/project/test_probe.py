"""The probe beside a store finds what no digest covers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import StaleStoreError
from pipeline.models.backbone import Preprocess
from pipeline.models.images import ImagePreprocess
from pipeline.models.texts import TextPreprocess
from pipeline.project import Project
from pipeline.store import Store, find_stores, verify
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(12))
    return tmp_path


def project(folder: Path, **changes: dict[str, object]) -> Project:
    return Project.load(tiny.write_params(folder, **changes))


def test_every_store_has_one_and_it_stays_as_it_is(folder: Path) -> None:
    encode_project(project(folder))
    before = {store: tiny.files(store / "probe") for store in find_stores(folder / "data/activations")}
    assert len(before) == 3
    for store, files in before.items():
        assert set(files) == {"probe.json", "probe.safetensors"}
        assert verify(Store.open(store)) == []
    encode_project(project(folder), rehash=True)
    assert before == {store: tiny.files(store / "probe") for store in before}
    kept = load_file(folder / "data/activations/0.5/probe/probe.safetensors")
    assert {name.split(".")[1] for name in kept} == {"input", "state"}
    assert kept["0.input.x"].shape == (3, 16, 16)


def use(folder: Path, how: str) -> None:
    match how:
        case "encode":
            tiny.write_images(folder / "photos", range(12, 14))
            encode_project(project(folder))
        case "predict":
            tiny.write_images(folder / "photos", range(12, 14))  # known samples do not run the prefix
            predict_project(project(folder), ["0.5"], None, folder / "said.jsonl")
        case "export":
            export_run(project(folder), "0.5", folder / "model")


@pytest.mark.parametrize("how", ["encode", "predict", "export"])
def test_code_that_no_digest_covers_is_found_where_the_prefix_is_run(folder: Path, monkeypatch: Any, how: str) -> None:
    encode_project(project(folder))
    train_project(project(folder), "0.5")
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: x.clamp(min=0.1))  # another library
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, w, b: convolve(x, w, b, 1, 1) * 1.1)
    before = tiny.files(folder / "data/activations")
    with pytest.raises(StaleStoreError, match=r"the network before the cut gives other values .*differs by"):
        use(folder, how)
    assert tiny.files(folder / "data/activations") == before


@pytest.mark.parametrize("how", ["encode", "predict", "export"])
def test_so_is_another_preprocessing(folder: Path, monkeypatch: Any, how: str) -> None:
    encode_project(project(folder))
    train_project(project(folder), "0.5")
    square = ImagePreprocess._square
    monkeypatch.setattr(ImagePreprocess, "_square", lambda self, image: square(self, image).flip(-1))
    with pytest.raises(StaleStoreError, match=r"the preprocessing gives other values .*x differs by"):
        use(folder, how)


def test_rounding_is_no_difference(folder: Path, monkeypatch: Any) -> None:
    encode_project(project(folder))
    convolve = torch.nn.Conv2d._conv_forward
    monkeypatch.setattr(
        torch.nn.Conv2d,
        "_conv_forward",
        lambda self, x, w, b: convolve(self, x.double(), w.double(), b.double()).float(),
    )
    use(folder, "encode")


def test_ids_must_be_the_very_same(tmp_path: Path, text_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(
        f'{{"text": "{text}", "label": "{"ab"[i % 2]}"}}\n' for i, text in enumerate(("one", "two", "good") * 3)
    )
    (tmp_path / "texts.jsonl").write_text(lines)
    given = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": "hf:bert"},
        "preprocess": {"kind": "text", "image_size": None},
    }
    encode_project(project(tmp_path, **given))
    tokenize = TextPreprocess._tokenize

    def lower(self: TextPreprocess, texts: tuple[str, ...], **settings: Any) -> Any:
        return tokenize(self, tuple(text.replace("c", "one") for text in texts), **settings)

    monkeypatch.setattr(TextPreprocess, "_tokenize", lower)
    with pytest.raises(StaleStoreError, match=r"the preprocessing gives other values .*input_ids"):
        encode_project(project(tmp_path, **given), rehash=True)


class Halved(Preprocess):
    """A preprocessing of one's own: its recipe says nothing of `factor`."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, content: object) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(np.array(content, np.float32) * self.factor)}

    def recipe(self) -> dict[str, Any]:
        return {"kind": "mine"}


def test_a_preprocessing_of_ones_own_is_in_the_recipe_by_its_code_and_attributes(
    folder: Path, monkeypatch: Any
) -> None:
    from pipeline.models import Backbone  # noqa: PLC0415

    factors = [0.5]
    monkeypatch.setattr(
        tiny,
        "own_backbone",
        lambda head: Backbone(tiny.ConvNet(head.size or 0), Halved(factors[0]), "mine"),
        raising=False,
    )
    np.savez(folder / "arrays.npz", x=np.random.default_rng(0).random((24, 3, 8, 8)), y=np.arange(24) % 3)
    given = {
        "data": {"source": "arrays", "path": "arrays.npz"},
        "model": {"backbone": "tiny:own_backbone"},
        "preprocess": {"kind": None, "image_size": None},
    }
    encode_project(project(folder, **given))
    assert (folder / "data/activations/0.5/probe/probe.json").read_text().count('"drawn": true') == 1
    encode_project(project(folder, **given), rehash=True)
    factors[0] = 0.25
    with pytest.raises(StaleStoreError, match=r"preprocessing\.code"):
        encode_project(project(folder, **given), rehash=True)


def test_a_probe_of_another_store_counts_for_nothing(folder: Path) -> None:
    encode_project(project(folder))
    file = folder / "data/activations/0.5/probe/probe.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    assert "probe.safetensors is not what was written" in verify(Store.open(folder / "data/activations/0.5"))[0]
