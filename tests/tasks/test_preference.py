"""Preference optimisation: losses and scores are those of two full models, the trained one and the one before it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_language import CHAT_PREFERENCES, COMPLETIONS, PREFERENCES, project, write_network, write_records
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data import build, open_source
from pipeline.errors import ConfigError, DataError
from pipeline.project import Project
from pipeline.workflows.codec_error import compare_outputs, measure
from pipeline.workflows.encode import encode_project
from pipeline.workflows.evaluate import evaluate_run
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

BETA = 0.5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path)
    for name in ("llama", "gpt2"):
        write_network(tmp_path / name, name)
    return tmp_path


def log_probability(model: Any, tokenizer: Any, prompt: str, answer: str, *, mean: bool) -> Tensor:
    """Return the log-probability of an answer, computed by hand of the logits of the whole model."""
    begin, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, prompt + answer))
    with torch.no_grad():
        logits = model(whole).logits.log_softmax(-1)[0, :-1]
    each = logits.gather(-1, whole[0, 1:, None])[begin.shape[1] - 1 :]
    return each.mean() if mean else each.sum()


def expected(of: Project, network: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the scores on records by two full models: the exported one, and the pretrained one as reference."""
    kind = of.task.loss
    tokenizer = AutoTokenizer.from_pretrained(network)
    trained, before = (AutoModelForCausalLM.from_pretrained(one).eval() for one in ("exported", network))

    def one(model: Any, record: dict[str, Any], side: str) -> Tensor:
        if of.data.source == "chat":
            turns = record["chat" if side == "a" else "other"]
            prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
            answer = turns[1]["content"] + "<end>"
        else:
            prompt, answer = record["q"], record[side] + "<end>"
        return log_probability(model, tokenizer, prompt, answer, mean=kind != "dpo")

    losses, margins = [], []
    for record in records:
        chosen, rejected = (one(trained, record, side) for side in ("a", "worse"))
        if kind == "orpo":
            odds = [value - torch.log(1 - value.exp()) for value in (chosen, rejected)]
            losses.append(-chosen - BETA * F.logsigmoid(odds[0] - odds[1]))
            margins.append(BETA * (chosen - rejected))
            continue
        gain = chosen - one(before, record, "a") - (rejected - one(before, record, "worse"))
        losses.append(-F.logsigmoid(BETA * gain) if kind == "dpo" else (gain - 1 / (2 * BETA)) ** 2)
        margins.append(BETA * gain)
    margin = torch.stack(margins)
    accuracy = (margin > 0).float().mean().item()
    return {
        "loss": torch.stack(losses).mean().item(),
        "reward_accuracy": accuracy,
        "reward_margin": margin.mean().item(),
    }


@pytest.mark.parametrize(
    ("network", "cut", "loss", "data", "more"),
    [
        ("llama", 0.5, "dpo", PREFERENCES, {}),
        ("gpt2", 0.75, "ipo", PREFERENCES, {}),
        ("llama", 1.0, "orpo", PREFERENCES, {}),
        ("llama", 0.75, "dpo", CHAT_PREFERENCES, {"adapter": {"rank": 4}}),
    ],
)
def test_scores_are_those_of_two_full_models(
    folder: Path, network: str, cut: float, loss: str, data: dict[str, Any], more: dict[str, Any]
) -> None:
    """The run's validation, `evaluate` from states, and `evaluate` by the merged network, agree with them."""
    of = project(
        folder,
        network,
        data=data,
        task={"kind": "preference", "loss": loss, "beta": BETA},
        encode={"cuts": [cut]},
        train={"epochs": 4, "lr": 0.01, **more},
    )
    encode_project(of)
    run = train_project(of, str(cut))
    if loss == "dpo":
        assert run.initial == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert run.value < run.initial
    export_run(of, run.name, folder / "exported")
    lines = [json.loads(line) for line in Path("preferences.jsonl").read_text().splitlines()]
    table = of.training_table()
    held_out = {int(table.targets["pair"][row]) for row in table.rows("validation")}
    wanted = expected(of, network, [lines[number] for number in sorted(held_out)])
    kept = next(row for row in run.history if row["validation/loss"] == run.value)
    scored, _ = evaluate_run(of, run.name, split="validation", live=True)
    for name, value in wanted.items():
        assert kept[f"validation/{name}"] == pytest.approx(value, abs=1e-5), name
        assert scored.cached[name] == pytest.approx(value, abs=1e-5), name
        assert scored.live[name] == pytest.approx(value, abs=1e-5), name
    assert run.review["unit"] == "pairs"
    assert run.review["wrong"] == round(len(held_out) * (1 - wanted["reward_accuracy"]))


def test_predictions_are_those_of_each_answer(folder: Path) -> None:
    of = project(folder, data=PREFERENCES, task={"kind": "preference"}, train={"epochs": 1})
    encode_project(of)
    run = train_project(of, "0.5")
    predict_project(of, [run.name], "preferences.jsonl", Path("out.jsonl"))
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(found) == 80
    assert all(line["loss"] > 0 and line["tokens"] > 0 for line in found)
    Path("others.jsonl").write_text(Path("preferences.jsonl").read_text().replace("nine", "ten"))
    with pytest.raises(DataError, match="evaluate a split of the project"):
        evaluate_run(of, run.name, "others.jsonl")


def test_pairs_of_a_group_stay_in_one_split(folder: Path) -> None:
    lines = [json.loads(line) for line in Path("preferences.jsonl").read_text().splitlines()]
    Path("users.jsonl").write_text("".join(json.dumps({**line, "user": i % 8}) + "\n" for i, line in enumerate(lines)))
    data = {**PREFERENCES, "path": "users.jsonl", "group": "user", "validation": 0.5}
    of = project(folder, data=data, task={"kind": "preference"})
    source = open_source(of.data)
    keys = np.array([[i // 256, i % 256, *[0] * 14] for i in range(len(source))], np.uint8)
    table = build(source, keys, of.data)
    sides = {(int(pair) % 8, str(split)) for pair, split in zip(table.targets["pair"], table.split, strict=True)}
    assert len(sides) == 8
    assert {side for _, side in sides} == {"train", "validation"}


def test_codecs_are_compared_on_a_language_model(folder: Path) -> None:
    """Token ids are stored in 32 bits, and losses take them in 64 only."""
    of = project(folder, data=PREFERENCES, task={"kind": "preference"})
    encode_project(of)
    of_codec = {one.storage: one for one in measure(of, "0.5", 8).deviations}
    assert of_codec["raw:float32"].output_largest == 0
    assert 0 < of_codec["int8-group:float32"].output_mean < of_codec["int4-group:float32"].output_mean
    hit, missed, ignored = [2.0, 0.0, 1.0], [3.0, 0.5, 1.0], [0.0, 0.0, 0.0]
    before, after = (torch.tensor([[hit, other, ignored]]) for other in (hit, missed))
    assert compare_outputs([before], [after], "language") == (1.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("data", "task", "message"),
    [
        (COMPLETIONS, {"kind": "preference"}, "data.chosen is not set"),
        (PREFERENCES, {"kind": "lm"}, "for task preference"),
        (PREFERENCES, {"kind": "preference", "loss": "kto"}, "preference has dpo, ipo, orpo"),
        ({**PREFERENCES, "rejected": None}, {"kind": "preference"}, "it needs prompt and completion, or"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, data: dict[str, Any], task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_project(project(folder, data=data, task=task))
