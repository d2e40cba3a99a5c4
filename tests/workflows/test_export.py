"""An exported model is the one that was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ViTConfig, ViTForImageClassification
from transformers import pipeline as transformers_pipeline

from pipeline.errors import DataError
from pipeline.project import Project
from pipeline.store import Reader, Store
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import ParityError, export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a finished run at cut 0.5."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    loaded = Project.load(tiny.write_params(tmp_path))
    encode_project(loaded)
    train_project(loaded, "0.5")
    return loaded


def test_the_state_dict_loads_into_the_plain_network(project: Project, tmp_path: Path) -> None:
    parity = export_run(project, "0.5", tmp_path / "model")
    assert parity.samples == 32
    assert parity.merged < 1e-5
    assert parity.stored < 2e-2
    network = tiny.ConvNet(3)
    network.load_state_dict(load_file(tmp_path / "model/model.safetensors"))
    trained = load_file("results/runs/0.5/model.safetensors")
    own = network.state_dict()
    assert trained
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.items())
    assert json.loads((tmp_path / "model/parity.json").read_text())["samples"] == 32
    assert json.loads((tmp_path / "model/backbone.json").read_text())["backbone"] == "tiny:conv_net"


def test_nothing_is_overwritten(project: Project, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("keep me")
    with pytest.raises(DataError, match="is not empty"):
        export_run(project, "0.5", tmp_path / "model")


def test_a_run_that_was_never_trained_is_named(project: Project, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1\.0/run\.json does not exist; train it"):
        export_run(project, "1.0", tmp_path / "model")


def test_states_that_are_not_the_networks_are_found_out(project: Project, tmp_path: Path) -> None:
    """The proof can fail: here every stored state is halved, and sealed as if it had been made so."""
    store = Store.open(Path("data/activations/0.5"))
    keys, reader = store.keys(), Reader(store.path)
    for segment in store.segments():
        tensors = {
            name: tensor.take(np.arange(len(tensor))) for name, tensor in reader.segment(segment).tensors.items()
        }
        states = {name: tensor / 2 for name, tensor in tensors.items() if name.startswith("state.")}
        shutil.rmtree(store.path / segment)
        store.write_segment(keys[: len(next(iter(tensors.values())))], tensors | states)
        keys = keys[len(next(iter(tensors.values()))) :]
    with pytest.raises(ParityError, match="nothing was exported"):
        export_run(project, "0.5", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def said(settings: dict[str, dict[str, object]], folder: Path) -> dict[str, dict[str, float]]:
    """Train and export the network `net`; what `recycle predict` says of each input, by its source."""
    made = Project.load(tiny.write_params(folder, **settings))
    encode_project(made)
    train_project(made, "0.5")
    export_run(made, "0.5", folder / "model")
    predict_project(made, ["0.5"], None, folder / "said.jsonl")
    lines = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    return {line["source"]: line["probabilities"] for line in lines}


def agree(theirs: list[dict[str, object]], ours: dict[str, float]) -> None:
    found = {str(one["label"]): one["score"] for one in theirs}
    assert found == pytest.approx(ours, abs=2e-3)


def test_texts_are_called_the_same_by_transformers(tmp_path: Path, text_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads((text_folder / "config.json").read_text())
    names = {"id2label": {"0": "z", "1": "x", "2": "y"}, "label2id": {"z": 0, "x": 1, "y": 2}}
    (text_folder / "config.json").write_text(json.dumps(config | names))
    texts = [f"{a} {b} {c}" for a in ("one", "two") for b in ("good", "bad", "three") for c in ("one", "bad", "two")]
    rows = [json.dumps({"text": text, "label": "xyz"[i % 3]}) for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    data = {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"}
    kind = {"kind": "text", "image_size": None}
    ours = said({"data": data, "model": {"backbone": "hf:bert"}, "preprocess": kind}, tmp_path)
    classify = transformers_pipeline("text-classification", str(tmp_path / "model"), top_k=None)
    for number, text in enumerate(texts):
        agree(classify([text])[0], ours[f"texts.jsonl#{number}"])


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_images_are_called_the_same_by_transformers(tmp_path: Path, monkeypatch: Any, resize: str) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(8))
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "square", 1: "stripe", 2: "circle"}}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes, **labels)).save_pretrained("net")
    shape = {"kind": None, "image_size": 16, "resize": resize, "mean": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    ours = said({"model": {"backbone": "hf:net"}, "preprocess": shape}, tmp_path)
    classify = transformers_pipeline("image-classification", str(tmp_path / "model"))
    for source, probabilities in ours.items():
        agree(classify(str(tmp_path / "photos" / source), top_k=3), probabilities)


def test_sounds_are_called_the_same_by_transformers(tmp_path: Path, monkeypatch: Any) -> None:
    soundfile = pytest.importorskip("soundfile", reason="sounds are decoded by the extra `audio`")
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        name = ("high", "low")[number % 2]
        (tmp_path / "sounds" / name).mkdir(parents=True, exist_ok=True)
        wave = np.sin(np.arange(8000) * (0.5 if name == "high" else 0.05) + number).astype(np.float32) / 2
        soundfile.write(tmp_path / f"sounds/{name}/{number}.wav", wave, 8000)
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, max_length=64, num_mel_bins=32
    )
    config.id2label = {0: "low", 1: "high"}
    torch.manual_seed(0)
    ASTForAudioClassification(config).save_pretrained("net")
    ASTFeatureExtractor(max_length=64, num_mel_bins=32, sampling_rate=8000).save_pretrained("net")
    ours = said(
        {
            "data": {"source": "audio", "path": "sounds"},
            "model": {"backbone": "hf:net"},
            "preprocess": {"kind": None, "image_size": None},
        },
        tmp_path,
    )
    classify = transformers_pipeline("audio-classification", str(tmp_path / "model"))
    for source, probabilities in ours.items():
        wave, _ = soundfile.read(tmp_path / "sounds" / source, dtype="float32")
        agree(classify({"raw": wave, "sampling_rate": 8000}, top_k=2), probabilities)
