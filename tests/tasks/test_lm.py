"""Language modelling from data to scores, predictions and an export."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_language import COMPLETIONS, project, write_network, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ConfigError
from pipeline.tasks import TaskConfig, open_task
from pipeline.workflows.codec_error import measure, table
from pipeline.workflows.encode import encode_project
from pipeline.workflows.evaluate import evaluate_run
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

TEXTS = {"source": "text", "path": "completions.jsonl", "text": "q"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path)
    for name in ("llama", "gpt2"):
        write_network(tmp_path / name, name)
    return tmp_path


def predicted() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_scores_are_weighted_by_tokens() -> None:
    task = open_task(TaskConfig(kind="lm"))
    scores, losses = task.metrics(), []
    for tokens in (1, 5, 2):
        output = torch.rand(2, 7, 3)
        output[..., 2] = 0
        output[:, 1 : 1 + tokens, 2] = 1
        output = output * output[..., 2:]
        output[0, 1, 1] = 0
        scores.update(output, {})
        losses += output[:, 1 : 1 + tokens, 0].flatten().tolist()
        assert task.loss(output, {}).item() == pytest.approx(np.mean(losses[-2 * tokens :]))
    assert len(losses) == 16
    found = scores.compute()
    assert found["loss"] == pytest.approx(np.mean(losses))
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)))
    assert found["token_accuracy"] == 3 / 16
    assert np.isnan(task.metrics().compute()["perplexity"])
    assert not task.higher_is_better


@pytest.mark.parametrize(
    ("network", "cut", "task"),
    [
        ("llama", 0.5, {}),
        ("gpt2", 0, {"loss_on": "all"}),
        ("gpt2", 0.5, {"untie_head": True, "monitor": "perplexity"}),
        ("gpt2", 1.0, {}),
    ],
)
def test_a_run_is_scored_predicts_and_is_exported(folder: Path, network: str, cut: float, task: dict[str, Any]) -> None:
    settings = project(folder, network, encode={"cuts": [cut]}, task=task)
    encode_project(settings)
    run = train_project(settings, str(cut))
    assert run.value < run.initial
    evaluation, _ = evaluate_run(settings, str(cut), split="validation", live=True)
    assert evaluation.cached == pytest.approx(evaluation.live, rel=1e-5)
    assert evaluation.cached[run.metric] == pytest.approx(run.value, rel=1e-5)
    assert predict_project(settings, [str(cut)], None, Path("out.jsonl"))
    assert export_run(settings, str(cut), folder / "model").merged < 1e-5
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings == is_tied == (network == "gpt2" and "untie_head" not in task)
    for line, said in zip((folder / "chats.jsonl").read_text().splitlines()[:5], predicted(), strict=False):
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
        labels = ids.clone()
        labels[:, : 0 if "loss_on" in task else len(asked)] = -100
        assert model.eval()(input_ids=ids, labels=labels).loss.item() == pytest.approx(said["loss"], rel=1e-4)
        assert said["tokens"] == (labels[:, 1:] >= 0).sum()


@pytest.mark.parametrize("data", [COMPLETIONS, TEXTS], ids=["completions", "text"])
def test_other_sources(folder: Path, data: dict[str, Any]) -> None:
    settings = project(folder, data=data)
    encode_project(settings)
    run = train_project(settings, "0.5")
    assert run.value < run.initial
    worst = run.review["mistakes"]
    assert [one["severity"] for one in worst] == sorted((one["severity"] for one in worst), reverse=True)


def test_other_tokens_encode_nothing(folder: Path) -> None:
    encode_project(project(folder))
    before = tiny.files(folder / "data/activations")
    values = []
    for loss_on in ("completions", "all"):
        settings = project(folder, task={"loss_on": loss_on})
        encode_project(settings)
        values.append(train_project(settings, "0.5").initial)
    assert tiny.files(folder / "data/activations") == before
    assert values[0] != values[1]


def test_codecs_are_compared_by_perplexity(folder: Path) -> None:
    settings = project(folder)
    encode_project(settings)
    report = measure(settings, "0.5", 10)
    of = {one.storage: one for one in report.deviations}
    assert (of["raw:float32"].perplexity, of["raw:float32"].changed) == (0, 0)
    change, finer = (of[f"{codec}:float32"].perplexity for codec in ("int4-group", "int8-group"))
    assert change is not None
    assert finer is not None
    assert 0 < abs(finer) < abs(change) < 1
    assert "perplexity" in table(report)


def test_a_head_untied_later_trains_and_encodes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "recycle")
    encode_project(project(folder, "gpt2"))
    tied = train_project(project(folder, "gpt2"), "0.5")
    assert "stays as it is; task.untie_head: true" in caplog.text
    untied = train_project(project(folder, "gpt2", task={"untie_head": True}), "0.5", "untied")
    assert "the head trains" in caplog.text
    assert untied.initial == pytest.approx(tied.initial, rel=1e-6)
    assert untied.history != tied.history


def test_adapters_leave_the_head_alone(folder: Path) -> None:
    train = {"adapter": "lora", "gradient_checkpointing": True, "group_by_length": True, "precision": "bf16"}
    settings = project(folder, train=train)
    encode_project(settings)
    run = train_project(settings, "0.5")
    assert run.value < run.initial
    assert export_run(settings, "0.5", folder / "model").merged < 1e-5
    before, after = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("llama", "model"))
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"kind": "classification"}}, "data.source is 'chat', for language models; set task.kind to lm"),
        ({"task": {"kind": "classification"}, "data": TEXTS}, "data.label is not set; task classification needs it"),
    ],
)
def test_settings_that_contradict_each_other(folder: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        project(folder, **sections)
