"""Weights before the cut are held and computed in `model.dtype`; those after it train in float32, as they came."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from suffix_runs import check_ways, project
from suffix_runs import images as image_folder
from test_flow_texts import folder as texts_folder
from test_flow_texts import pairs
from test_flow_texts import project as text_project
from transformers import BertForSequenceClassification

from pipeline.encode.ragged import pad_batch
from pipeline.errors import ConfigError, StaleStoreError
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.project.towers import open_tower
from pipeline.store import Reader
from pipeline.workflows.encode import encode_project
from pipeline.workflows.evaluate import evaluate_run
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

images, texts = image_folder, texts_folder
HALF = {"model.dtype": "bfloat16"}


@pytest.fixture
def half_texts(texts: Path) -> Path:
    """The folder of texts, with the weights of its network in bfloat16."""
    network = BertForSequenceClassification.from_pretrained(texts / "bert", dtype=torch.bfloat16)
    network.save_pretrained(texts / "bert")
    return texts


def compute_dtype(project: Project, cut: str) -> str:
    return project.open_store(project.cut(cut)).recipe.compute_dtype


def test_auto_is_the_type_of_the_checkpoint(half_texts: Path) -> None:
    made = text_project(half_texts)
    encode_project(made)
    assert compute_dtype(made, "0.5") == "bfloat16"
    table = made.training_table()
    loaded = LoadedModel.open(made, table)
    store, prefix, suffix = loaded.open_store(0.5, table)
    assert prefix is not None
    assert {item.dtype for item in loaded.backbone.model.parameters()} == {torch.bfloat16}
    assert {item.dtype for item in suffix.parameters()} == {torch.float32}
    sample = loaded.backbone.preprocess("one two good")
    state = prefix(**pad_batch([sample, sample], loaded.backbone.preprocess.pad))
    assert {item.dtype for item in state.values()} == {torch.bfloat16}
    stored = Reader(store.path).gather(store.first_places(torch.arange(1).numpy()))
    assert {item.dtype for name, item in stored.items() if name.startswith("state.")} == {torch.float16}


@pytest.mark.parametrize("cut", ["0", "0.5", "1.0"])
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_runs_are_equal_however_the_suffix_is_opened(half_texts: Path, cut: str, adapter: str | None) -> None:
    if adapter and cut == "1.0":
        pytest.skip("no layer is left to adapt")
    made = text_project(half_texts, train={"adapter": adapter, "epochs": 1})
    encode_project(made)
    check_ways(made, cut, half_texts / "bert")
    weights = load_file("results/runs/whole/model.safetensors")
    assert {item.dtype for item in weights.values()} == {torch.float32}


def test_new_layers_of_an_embedding_keep_what_was_drawn(half_texts: Path) -> None:
    made = pairs(half_texts, layers=[{"mlp": [6]}])
    encode_project(made)
    exact = LoadedModel.open(made.overridden({"model.dtype": "float32"}), made.training_table()).backbone.model
    check_ways(made, "1.0", half_texts / "bert")
    suffix = open_tower(made, 1.0, made.training_table()).suffix
    for name in ("projection.0.0.weight", "projection.0.0.bias"):
        assert torch.equal(suffix.get_parameter(name), exact.get_parameter(name))


@pytest.mark.parametrize("cut", ["0", "0.5", "1.0"])
def test_what_trains_is_not_rounded(images: Path, cut: str) -> None:
    kept = load_file(images / "net.safetensors")
    for name, item in kept.items():
        if "running" in name:  # statistics of a pretrained network, unlike those of a new one
            kept[name] = torch.rand(item.shape, generator=torch.Generator().manual_seed(len(item))) + 0.1
    save_file(kept, images / "net.safetensors")
    made = project().overridden(HALF)
    encode_project(made)
    assert compute_dtype(made, cut) == "bfloat16"
    tower = open_tower(made, made.cut(cut), made.training_table())
    own, fresh = tower.suffix.state_dict(), tower.loaded.backbone.fresh
    trained = {name: item for name, item in own.items() if name not in fresh}
    assert any("running" in name for name in trained) == (cut != "1.0")
    assert trained or cut == "1.0"
    assert all(torch.equal(item, kept[name]) for name, item in trained.items())
    rounded = tower.loaded.backbone.model.get_parameter("blocks.0.0.weight")
    assert torch.equal(rounded, kept["blocks.0.0.weight"].bfloat16())
    check_ways(made, cut, images / "net.safetensors")


def test_a_file_in_float16_is_computed_in_float16(images: Path) -> None:
    save_file({name: item.half() for name, item in tiny.ConvNet(3).state_dict().items()}, images / "net.safetensors")
    encode_project(project())
    assert compute_dtype(project(), "0.5") == "float16"
    check_ways(project(), "0.5", images / "net.safetensors")
    with pytest.raises(StaleStoreError, match="compute_dtype"):
        train_project(project().overridden({"model.dtype": "float32"}), "0.5")


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_runs_are_evaluated_exported_and_used(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("images" if kind == "images" else "half_texts")
    made = project().overridden(HALF) if kind == "images" else text_project(folder)
    encode_project(made)
    run = train_project(made, "0.5")
    evaluation, _ = evaluate_run(made, run.name, split="validation", live=True)
    assert evaluation.largest_difference is not None
    assert evaluation.largest_difference < 0.15
    parity = export_run(made, run.name, Path("exported"))
    assert parity.merged < 1e-5
    assert parity.stored < 0.05
    assert predict_project(made, [run.name], made.data.path, Path("predictions.jsonl"))


def test_the_suffix_trains_in_bfloat16_where_asked(half_texts: Path) -> None:
    made = text_project(half_texts, train={"dtype": "bfloat16", "epochs": 1})
    encode_project(made)
    check_ways(made, "0.5", half_texts / "bert")
    weights = load_file("results/runs/whole/model.safetensors")
    assert {item.dtype for item in weights.values() if item.is_floating_point()} == {torch.bfloat16}
    assert evaluate_run(made, "whole", split="validation")[0].samples > 0


def test_weights_of_16_bits_compute_in_their_type(half_texts: Path) -> None:
    made = text_project(half_texts, encode={"cuts": [0.5], "precision": "float32"})
    with pytest.raises(ConfigError, match=r"encode\.precision is float32, and the weights are of type bfloat16"):
        encode_project(made)
    wide = made.overridden({"model.dtype": "float32"})
    assert encode_project(wide)
    assert compute_dtype(wide, "0.5") == "float32"
