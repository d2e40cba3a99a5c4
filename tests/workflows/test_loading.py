"""An export is loaded by the lines that come with it, in a process without this package."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pipeline.encode.ragged import pad_batch
from pipeline.models import network_inputs
from pipeline.project import Project
from pipeline.runs.finished import open_run
from pipeline.tasks import read_tensor
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project
from stages.cli import recycle

pytestmark = pytest.mark.slow

OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(4)))
        self.classifier = nn.Linear(3, classes)

    def forward(self, x):
        return self.classifier(self.blocks(x).mean((2, 3)))


def net(head):
    return Net(head.size)
"""
APART = """
import runpy, sys
sys.modules |= {"pipeline": None, "stages": None}
model = runpy.run_path(sys.argv[1])["model"]
from safetensors.torch import load_file, save_file
output = model(**load_file("inputs.safetensors"))
output = getattr(output, "logits", output)
save_file({"output": output.detach().contiguous()}, "output.safetensors")
"""
LAYERS = [{"dropout": 0.2}, "layer_norm", {"mlp": [6]}]
HEAD = [{"skip": 0.1}, "gated", {"mlp": {"widths": [8, 5], "activation": "gelu"}}, {"activation": "tanh"}]
IMAGES: dict[str, dict[str, Any]] = {"preprocess": {"kind": None, "image_size": 32}, "train": {"epochs": 1}}


def images(backbone: str, **changes: Any) -> dict[str, dict[str, Any]]:
    return IMAGES | {"model": {"backbone": backbone, "weights": None}, "task": changes}


def texts(**changes: Any) -> dict[str, dict[str, Any]]:
    return {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": "hf:bert"},
        "preprocess": {"kind": "text", "image_size": None},
        "train": {"epochs": 1},
        "task": changes,
    }


SIMILARITY = {"kind": "similarity", "loss": "triplet_margin"}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "torchvision": images("torchvision:squeezenet1_1"),
    "torchvision, layers": images("torchvision:mobilenet_v3_small", layers=LAYERS),
    "torchvision, embedding": images("torchvision:resnet18", layers=HEAD, **SIMILARITY),
    "timm": images("timm:test_efficientnet"),
    "timm, layers": images("timm:test_vit", layers=LAYERS),
    "timm, embedding": images("timm:test_efficientnet", layers=[], **SIMILARITY),
    "hf": texts(),
    "hf, layers": texts(layers=LAYERS),
    "hf, embedding": texts(layers=HEAD, **SIMILARITY),
    "function": {"model": {"backbone": "mine:net"}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_lines_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    tiny.write_images(tmp_path / "photos", range(8))
    tiny.write_text_network(tmp_path / "bert")
    lines = [json.dumps({"text": f"one {a} {b}", "label": a}) for a in ("two", "good", "bad") for b in tiny.TOKENS[5:]]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    project = Project.load(tiny.write_params(tmp_path, **{"encode": {"cuts": [0.5]}, **CASES[case]}))
    assert encode_project(project)
    train_project(project, "0.5")
    said = CliRunner().invoke(recycle, ["export", "--run", "0.5", "model"], catch_exceptions=False).output
    run = open_run(project, "0.5")
    source, preprocess = project.source(), run.loaded.backbone.preprocess
    batch = network_inputs(pad_batch([preprocess(source.content(i)) for i in range(4)], preprocess.pad))
    save_file(batch, "inputs.safetensors")
    with torch.no_grad():
        expected = read_tensor(run.suffix(run.prefix(**batch), **batch))
    child = [sys.executable, "-W", "error", "-c", APART, "model/load.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(child, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = load_file("output.safetensors")["output"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    code = (tmp_path / "model/load.py").read_text()
    assert code.replace("Path(__file__).parent", "Path('model')") in said


def test_what_is_written_is_as_open_as_the_umask_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(8))
    before = os.umask(0o027)
    try:
        settings = images("timm:test_efficientnet", layers=LAYERS)
        encode_project(Project.load(tiny.write_params(tmp_path, **{"encode": {"cuts": [0.5]}, **settings})))
        train_project(Project.load(Path("params.yaml")), "0.5")
        CliRunner().invoke(recycle, ["export", "--run", "0.5", "model"], catch_exceptions=False)
    finally:
        os.umask(before)
    for folder in ("data", "results", "model"):
        modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / folder).rglob("*") if file.is_file()}
        assert modes == {0o640}
