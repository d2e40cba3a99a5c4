"""`recycle export --adapter`: peft loads the files on the plain pretrained network, and gets the run's outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from peft import PeftModel
from tiny_language import PREFERENCES, project, write_network, write_records
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.errors import ConfigError
from pipeline.project import Project
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_adapter, export_run
from pipeline.workflows.train import train_project
from stages import cli

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
LORA = {"adapter": {"kind": "lora", "rank": 2}, "epochs": 2, "lr": 0.05}


def difference(base: Any, whole: Any, adapter: Path) -> float:
    """Return the largest difference of logits, over the largest logit."""
    ids = torch.tensor([[2, 4, 6, 3, 5]])
    with torch.no_grad():
        expected = whole.eval()(ids).logits
        plain = base.eval()(ids).logits
        found = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
    assert not torch.allclose(plain, expected, atol=1e-2), "the run changed nothing"
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("network", "more"),
    [
        ("llama", {}),
        ("gpt2", {"data": PREFERENCES, "task": {"kind": "preference"}}),  # its layers are transposed
    ],
)
def test_of_a_language_model(
    network: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path)
    write_network(tmp_path / network, network)
    of = project(tmp_path, network, train=LORA, **more)
    encode_project(of)
    run = train_project(of, "0.5")
    export_run(of, run.name, tmp_path / "whole")
    result = CliRunner().invoke(cli.recycle, ["export", "adapter", "--run", run.name, "--adapter"])
    assert result.exit_code == 0, result.output
    load = AutoModelForCausalLM.from_pretrained
    assert difference(load(network), load("whole"), tmp_path / "adapter") < 1e-5
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == 2


def test_a_new_head_is_saved_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_text_network(tmp_path / "bert")
    lines = [{"text": f"{word} {n}", "label": word} for word in ("good", "bad", "three") for n in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"}
    params = tiny.write_params(
        tmp_path,
        data=data,
        model={"backbone": f"hf:{tmp_path / 'bert'}"},
        preprocess={"kind": "text", "image_size": None},
        encode={"cuts": [0.5]},
        train=LORA,
    )
    of = Project.load(params)
    encode_project(of)
    run = train_project(of, "0.5")
    export_run(of, run.name, tmp_path / "whole")
    assert export_adapter(of, run.name, tmp_path / "adapter") < 1e-5
    base = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=3)
    whole = AutoModelForSequenceClassification.from_pretrained("whole")
    assert difference(base, whole, tmp_path / "adapter") < 1e-5
    plain = train_project(of.overridden({"train.adapter": None, "train.epochs": 1}), "0.5", "plain")
    with pytest.raises(ConfigError, match=r"train.adapter: lora; here are .* None"):
        export_adapter(of, plain.name, tmp_path / "other")
    assert not (tmp_path / "other").exists()
