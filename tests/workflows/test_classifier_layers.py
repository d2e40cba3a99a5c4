"""`task.layers` before the last linear layer of a classifier: trained from stores that were encoded without them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from test_flow_words import write_words

from pipeline.project import Project
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")
LABELS = {
    "classification": lambda number: "abc"[number % 3],
    "multi-label": lambda number: ["a", "b"][: number % 3],
    "regression": lambda number: number % 5,
}


def project(folder: Path, kind: str, **changes: Any) -> Project:
    """Sentences with a label, or words with tags."""
    data: dict[str, Any] = {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"}
    if kind == "tagging":
        write_words(folder)
        data = {"source": "conll", "path": "words.conll"}
    else:
        texts = [f"{WORDS[i % 5]} {WORDS[i // 5 % 5]} {WORDS[i // 25]}" for i in range(60)]
        lines = [json.dumps({"text": text, "label": LABELS[kind](i)}) for i, text in enumerate(texts)]
        (folder / "texts.jsonl").write_text("\n".join(lines))
    settings: dict[str, dict[str, object]] = {
        "data": data,
        "model": {"backbone": f"hf:{folder / 'bert'}"},
        "preprocess": {"kind": "text", "image_size": None},
        "encode": {"cuts": [0.5]},
        "task": {"kind": kind} | changes,
    }
    return Project.load(tiny.write_params(folder, **settings))


@pytest.mark.parametrize("kind", [*LABELS, "tagging"])
def test_layers_train_and_are_exported(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert encode_project(project(tmp_path, kind))
    before = tiny.files(tmp_path / "data/activations")
    layered = project(tmp_path, kind, layers=[{"dropout": 0.2}, {"mlp": [6]}])
    run = train_project(layered, "0.5")
    assert encode_project(layered)
    after = tiny.files(tmp_path / "data/activations")
    assert {name for name in after if after[name] != before[name]} <= {
        f"0.5/suffix/{name}" for name in ("model.safetensors", "new.safetensors", "split.json", "suffix.json")
    }
    assert run.history[-1]["train/loss"] < run.history[0]["train/loss"]
    parity = export_run(layered, "0.5", tmp_path / "model")
    assert parity.merged < 1e-5
    assert json.loads((tmp_path / "model/backbone.json").read_text())["classifier"] == "classifier"
    kept, trained = (load_file(file) for file in ("model/classifier.safetensors", "results/runs/0.5/model.safetensors"))
    assert {f"classifier.{name}" for name in kept} < trained.keys()
    assert not any(name.startswith("classifier") for name in load_file("model/model.safetensors"))
    assert predict_project(layered, ["0.5"], None, tmp_path / "said.jsonl") is not None
    assert (tmp_path / "said.jsonl").read_text().count("\n") >= 60
