"""A run opens the pretrained suffix of its store, whether or not the weights that params.yaml names are there."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from suffix_runs import age, check_ways, counted, hide, project
from suffix_runs import images as image_folder
from test_flow_texts import folder as texts_folder
from test_flow_texts import pairs
from test_flow_texts import project as text_project
from torchvision.models import squeezenet1_1

from pipeline.errors import AbsentError
from pipeline.store import find_stores, verify
from pipeline.workflows.encode import encode_project
from pipeline.workflows.evaluate import evaluate_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

images, texts = image_folder, texts_folder


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
