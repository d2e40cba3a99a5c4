"""Recomputed blocks change no run; compiled ones change it by rounding."""

from pathlib import Path

import pytest
import torch
from suffix_runs import result
from test_flow_texts import folder as texts_folder
from test_flow_texts import project as text_project

from pipeline.errors import ConfigError
from pipeline.store import Reader
from pipeline.workflows.encode import encode_project
from pipeline.workflows.sweep import sweep_project
from pipeline.workflows.train import open_run_accelerator, train_project

pytestmark = pytest.mark.slow

texts = texts_folder


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_run_that_recomputes_its_blocks_is_the_same(texts: Path, adapter: str | None) -> None:
    made = text_project(texts, train={"epochs": 2, "adapter": adapter})
    encode_project(made)
    plain = train_project(made, "0.5", name="plain")
    recomputed = train_project(made.overridden({"train.gradient_checkpointing": True}), "0.5", name="recomputed")
    assert result(plain)[:2] == result(recomputed)[:2]


def test_runs_of_a_sweep_recompute_or_not(texts: Path) -> None:
    made = text_project(texts, train={"epochs": 1})
    encode_project(made)
    settings = [{"train.gradient_checkpointing": on, "train.seed": seed} for on in (True, False) for seed in (0, 1)]
    runs = sweep_project(made.params, {"cut": "0.5"}, settings).finished
    by_seed = {seed: [result(run)[:2] for run in runs if run.overrides.get("train.seed") == seed] for seed in (0, 1)}
    assert [len(results) for results in by_seed.values()] == [2, 2]
    assert all(first == second for first, second in by_seed.values())


def test_what_cannot_be_recomputed_is_said(texts: Path) -> None:
    made = text_project(texts, train={"gradient_checkpointing": True})
    encode_project(made)
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing is true, and after the cut .* no block"):
        train_project(made, "1.0")


def test_a_compiled_run_and_compiled_states(texts: Path) -> None:
    made = text_project(texts, train={"epochs": 1})
    encode_project(made)
    plain = train_project(made, "0.5", name="plain")
    compiled = train_project(made.overridden({"train.compile": True}), "0.5", name="compiled")
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
    store = made.open_store(0.5)
    states = Reader(store.path).gather(store.rows(store.keys()))
    (texts / "data").rename(texts / "before")
    made = made.overridden({"encode.compile": True})
    assert encode_project(made)
    store = made.open_store(0.5)
    found = Reader(store.path).gather(store.rows(store.keys()))
    assert states.keys() == found.keys()
    assert all(torch.allclose(states[name].float(), item.float(), atol=2e-3) for name, item in found.items())


def test_without_a_compiler_compilation_is_refused(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = text_project(texts, train={"compile": True}, encode={"cuts": [0.5], "compile": True})
    monkeypatch.setenv("CXX", "none-such")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("none-such",))
    with pytest.raises(ConfigError, match=r"encode\.compile is true, and no C\+\+ compiler is here"):
        encode_project(made)
    with pytest.raises(ConfigError, match=r"train\.compile is true, and no C\+\+ compiler is here"):
        open_run_accelerator(made, "run")
