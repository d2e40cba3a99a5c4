"""A run opens the pretrained suffix of its store, whether or not the weights that params.yaml names are there."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_flow_texts import folder as texts_folder
from test_flow_texts import pairs
from test_flow_texts import project as text_project
from torchvision.models import squeezenet1_1

from pipeline.errors import AbsentError, CorruptStoreError, StaleStoreError
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.project.pretrained_suffix import PretrainedSuffix
from pipeline.report.summary import Run
from pipeline.runs.finished import open_run
from pipeline.store import Store, find_stores, verify
from pipeline.tasks import Head
from pipeline.workflows.encode import encode_project
from pipeline.workflows.evaluate import evaluate_run
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

texts = texts_folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty images and a file of weights for the tiny network, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    torch.manual_seed(3)
    save_file(tiny.ConvNet(3).state_dict(), tmp_path / "net.safetensors")
    return tmp_path


def project(**changes: dict[str, object]) -> Project:
    given = {"weights": "net.safetensors"} | changes.pop("model", {})
    return Project.load(tiny.write_params(Path(), model=given, **changes))


def hide(path: Path) -> Path:
    return path.rename(path.with_name(f"hidden-{path.name}"))


def result(run: Run) -> object:
    """What a run gave, but for how long it took."""
    weights = load_file(Path("results/runs") / run.name / "model.safetensors")
    kept = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    return [[{name: row[name] for name in row if "seconds" not in name} for row in run.history], kept, run.identity]


def age(weights: Path) -> None:
    """Make the files of weights old enough to be known by their stamps."""
    for file in [weights, *weights.rglob("*")]:
        os.utime(file, ns=(0, 10**18))


def check_ways(made: Project, cut: str, weights: Path) -> None:
    """A run of the whole network, one of a suffix whose weights are known, and one where they are missing are equal."""
    age(weights)
    for cache in Path(".recycle").glob("*recipes.json"):
        cache.unlink()
    with counted() as built:
        whole = train_project(made, cut, name="whole")
        assert len(built) == len(made.parts)
        known = train_project(made, cut, name="known")
        assert len(built) == len(made.parts), "the whole network is built for one run only"
    hidden = hide(weights)
    try:
        missing = train_project(made, cut, name="missing")
    finally:
        hidden.rename(weights)
    assert result(whole) == result(known) == result(missing)


@contextmanager
def counted() -> Iterator[list[Project]]:
    """Collect the projects whose whole network is built and loaded."""
    build, built = LoadedModel._build.__func__, list[Project]()

    def counting(cls: type[LoadedModel], project: Project, *more: object) -> LoadedModel:
        loaded = build(cls, project, *more)
        built.append(project)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "_build", classmethod(counting))
        yield built


@pytest.mark.parametrize("cut", ["0", "0.5", "1.0"])
def test_a_network_of_ones_own(images: Path, cut: str, caplog: pytest.LogCaptureFixture) -> None:
    encode_project(project())
    check_ways(project(), cut, images / "net.safetensors")
    assert f"the pretrained weights that data/activations/{cut} carries are used" in caplog.text
    kept = load_file(f"data/activations/{cut}/suffix/model.safetensors")
    assert ("blocks.0.0.weight" in kept) is (cut == "0")
    assert "classifier.weight" in kept, "the file had one for three classes"


@pytest.mark.parametrize("task", ["classification", "similarity"])
def test_a_network_of_torchvision(images: Path, task: str) -> None:
    torch.manual_seed(5)
    torch.save(squeezenet1_1(num_classes=7).state_dict(), "squeeze.pth")
    made = project(
        model={"backbone": "torchvision:squeezenet1_1", "weights": "squeeze.pth"},
        preprocess={"kind": None, "image_size": 32},
        encode={"cuts": [0.5]},
        task={"kind": task},
        train={"head_lr": 0.02, "epochs": 1},
    )
    encode_project(made)
    check_ways(made, "0.5", images / "squeeze.pth")


@pytest.mark.parametrize("cut", ["0", "0.5", "1.0"])
def test_a_directory_of_hugging_face_with_its_tokenizer(texts: Path, cut: str) -> None:
    made = text_project(texts)
    encode_project(made)
    check_ways(made, cut, texts / "bert")


def test_layers_in_place_of_the_pretrained_classifier(texts: Path) -> None:
    plain = text_project(texts)
    layered = plain.overridden({"task.layers": [{"dropout": 0.1}, {"mlp": [6]}]})
    for encoded in (plain, layered):
        encode_project(encoded)
        check_ways(layered, "0.5", texts / "bert")
    hide(texts / "bert")
    with pytest.raises(AbsentError, match=r"head\.classifier_replaced = True"):
        train_project(plain, "0.5")


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_pairs_with_and_without_adapters(texts: Path, adapter: str | None) -> None:
    made = pairs(texts)
    made = made.overridden({"train.adapter": adapter, "train.epochs": 1})
    encode_project(made)
    check_ways(made, "0.5", texts / "bert")


def test_an_encoder_for_each_role(texts: Path) -> None:
    short = {"kind": "text", "max_length": 9}
    made = pairs(texts).overridden({"towers": {"anchor": {"cut": 1.0}, "positive": {"preprocess": short}}})
    encode_project(made)
    check_ways(made, "0.5", texts / "bert")


def test_augmented_views(images: Path) -> None:
    augment = {"kind": "image", "image_size": 16, "augment": ["RandomHorizontalFlip"]}
    made = project(preprocess=augment, encode={"cuts": [0.5], "views": 2})
    encode_project(made)
    assert [store.as_posix() for store in find_stores(Path()) if (store / "suffix").exists()] == [
        "data/activations/0.5"
    ]
    check_ways(made, "0.5", images / "net.safetensors")


def test_a_store_elsewhere_carries_it_too(images: Path) -> None:
    made = project(encode={"cuts": [0.5], "store": f"file://{images}/bucket"})
    encode_project(made)
    written = {path: path.stat().st_mtime_ns for path in (images / "bucket").rglob("*") if path.is_file()}
    assert images / "bucket/0.5/suffix/suffix.json" in written
    encode_project(made, rehash=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    shutil.rmtree(".recycle")
    check_ways(made, "0.5", images / "net.safetensors")
    assert verify(made.open_store(0.5)) == []


def test_only_what_changed_is_written_again(images: Path) -> None:
    encode_project(project())
    written = {path: path.stat().st_mtime_ns for path in Path("data/activations").rglob("*") if path.is_file()}
    encode_project(project(), rehash=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    state = load_file("net.safetensors")
    save_file(state | {"classifier.bias": state["classifier.bias"] + 1}, "net.safetensors")
    encode_project(project())
    kept = load_file("data/activations/1.0/suffix/model.safetensors")
    assert torch.equal(kept["classifier.bias"], state["classifier.bias"] + 1)


def test_what_was_lost_is_carried_again(images: Path) -> None:
    made = project()
    encode_project(made)
    before = tiny.files(Path("data/activations"))
    for file in Path("data/activations/0.5/suffix").iterdir():
        if file.is_file():
            file.unlink()
    encode_project(made)
    assert tiny.files(Path("data/activations")) == before


def test_it_may_be_left_out(images: Path) -> None:
    encode_project(project())
    made = project(encode={"suffix": False})
    encode_project(made)
    assert not list(Path("data/activations").rglob("suffix"))
    hide(images / "net.safetensors")
    with pytest.raises(AbsentError, match=r"net.safetensors'; nothing is there .*carries no weights.*encode\.suffix"):
        train_project(made, "0.5")


def test_weights_of_other_settings_do_not_stand_in(images: Path) -> None:
    encode_project(project())
    hide(images / "net.safetensors")
    with pytest.raises(AbsentError, match=r"model\.weights = 'net.safetensors', today's is 'other.safetensors'"):
        train_project(project(model={"weights": "other.safetensors"}), "0.5")
    with pytest.raises(StaleStoreError, match=r"preprocessing.image_size"):
        train_project(project(preprocess={"kind": "image", "image_size": 12}), "0.5")
    with pytest.raises(AbsentError, match=r"head\.size = 3, today's is 4"):
        PretrainedSuffix.of(Store.open(Path("data/activations/0.5")), project().model, Head("classes", 4))


def test_damage_is_told(images: Path) -> None:
    encode_project(project())
    file = Path("data/activations/0.5/suffix/model.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert [fault for fault in verify(Store.open(Path("data/activations/0.5"))) if "not what was written" in fault]
    hide(images / "net.safetensors")
    with pytest.raises(CorruptStoreError, match=r"model\.safetensors is not what was written"):
        train_project(project(), "0.5")
    about = Path("data/activations/1.0/suffix/suffix.json")
    said = json.loads(about.read_text())
    about.write_text(json.dumps(said | {"about": said["about"] | {"recipe": "0" * 32}}))
    with pytest.raises(CorruptStoreError, match="belongs to another store"):
        train_project(project(), "1.0")


def test_the_whole_model_takes_all_weights(images: Path) -> None:
    encode_project(project())
    hide(images / "net.safetensors")
    train_project(project(), "0.5")
    with pytest.raises(
        AbsentError, match=r"run 0\.5: model\.weights is 'net.safetensors'; nothing is there.*before the cut"
    ):
        export_run(project(), "0.5", Path("exported"))
    with pytest.raises(AbsentError, match="before the cut"):
        open_run(project(), "0.5")


def test_encoding_takes_all_weights(images: Path) -> None:
    encode_project(project())
    (images / "photos/square/new.png").write_bytes(tiny.draw(1, 99))
    hide(images / "net.safetensors")
    with pytest.raises(AbsentError, match="nothing is there"):
        encode_project(project())


def test_nothing_is_carried_that_cannot_be_missed(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        encode_project(project(model={"weights": "pretrained"}))
    assert not list(Path("data/activations").rglob("suffix"))
    assert "carries" not in caplog.text


def test_predictions_and_scores_of_known_samples_do_not_read_the_prefix(images: Path) -> None:
    weights = images / "net.safetensors"
    age(weights)
    encode_project(project())
    train_project(project(), "0.5")
    scores = evaluate_run(project(), "0.5", split="validation")
    with counted() as built:
        hidden = weights
        for name in ("known", "missing"):
            assert predict_project(project(), ["0.5"], None, Path(f"{name}.jsonl"))
            assert evaluate_run(project(), "0.5", split="validation") == scores
            assert evaluate_run(project(), "0.5", "photos", "train")[0].bad == 0
            hidden = hide(weights) if weights.exists() else hidden
        assert not built
    assert Path("known.jsonl").read_bytes() == Path("missing.jsonl").read_bytes()
    (images / "photos/square/new.png").write_bytes(tiny.draw(1, 99))
    with pytest.raises(AbsentError, match="before the cut too"):
        predict_project(project(), ["0.5"], None, Path("new.jsonl"))
    hidden.rename(weights)
    assert predict_project(project(), ["0.5"], None, Path("new.jsonl"))


def test_weights_that_changed_are_read(images: Path) -> None:
    age(images / "net.safetensors")
    encode_project(project())
    state = load_file("net.safetensors")
    name = "blocks.0.0.weight"
    save_file(state | {name: state[name] + 1}, "net.safetensors")
    with pytest.raises(StaleStoreError, match="weights"):
        train_project(project(), "0.5")


def test_another_network_is_not_filled_in(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    age(images / "net.safetensors")
    encode_project(project())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.ConvNet, "forward", lambda self, x: self.classifier(self.blocks(x).mean((2, 3))) * 1)
        with caplog.at_level(logging.INFO), pytest.raises(StaleStoreError, match="architecture"):
            train_project(project(), "0.5")
    assert "are of another network: module '' has other attributes" in caplog.text


def test_a_split_by_another_version_of_the_library_is_proved_again(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(squeezenet1_1(num_classes=3).state_dict(), "squeeze.pth")
    age(images / "squeeze.pth")
    made = project(
        model={"backbone": "torchvision:squeezenet1_1", "weights": "squeeze.pth"},
        preprocess={"kind": None, "image_size": 32},
        encode={"cuts": [0.5]},
        train={"epochs": 1},
    )
    encode_project(made)
    with counted() as built, pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        train_project(made, "0.5", name="same")
        assert not built
        patch.setattr("pipeline.project.pretrained_suffix.version", lambda name: "99")
        train_project(made, "0.5", name="other")
        assert len(built) == 1
    assert ", here is 99, whose code may differ" in caplog.text
