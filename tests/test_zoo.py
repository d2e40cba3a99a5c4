"""A sample of the zoo, proved like the whole of it, and the runner's promises."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import rows
from zoo.__main__ import current
from zoo.catalogue import Entry, entries
from zoo.proof import prove
from zoo.runner import run

pytestmark = pytest.mark.slow

CATALOGUE = {(entry.group, entry.name): entry for entry in entries()}

SAMPLE = {
    "torchvision classification": ["googlenet", "mnasnet0_5", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"],
    "torchvision segmentation": ["lraspp_mobilenet_v3_large"],
    "torchvision detection": ["fasterrcnn_mobilenet_v3_large_320_fpn"],
    "torchvision video": ["mc3_18"],
    "timm": ["convit", "mobilevit", "nfnet", "starnet", "vision_transformer_relpos"],
    "transformers": [
        "albert",
        "bart",
        "bert",
        "clip_vision_model",
        "deberta-v2",
        "gpt2",
        "llama",
        "mamba",
        "mixtral",
        "roberta",
        "segformer",
        "t5",
        "wav2vec2",
        "whisper",
        "xlnet",
    ],
    "transformers language models": ["falcon_mamba", "gemma2", "phi", "roberta", "whisper"],
}
"""Quick models whose mechanisms differ: branches, windows, shared layers, decoders, experts, states that are ragged."""


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in SAMPLE.items() for name in names])
def test_model_is_exact(group: str, name: str) -> None:
    entry = CATALOGUE[group, name]
    proof = prove(entry.make, entry.example, 0.5)
    assert (proof.status, proof.reason) == ("exact", "")


def test_every_model_has_a_name_of_its_own() -> None:
    assert len(CATALOGUE) == len(entries())


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))


class Shrinking(Small):
    """Answers differently to whoever asks last, which no suffix can know."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        Shrinking.calls += 1
        return super().forward(inputs) / (1.0 + 1e-4 * Shrinking.calls)


def crash() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    return Small()


def hang() -> nn.Module:
    time.sleep(600)
    return Small()


def spin() -> nn.Module:
    while True:
        pass


def error() -> nn.Module:
    raise FileNotFoundError("no weights")


def batch(size: int) -> Tensor:
    return torch.ones(size, 3)


def entry(name: str, make: Callable[[], nn.Module]) -> Entry:
    return Entry("own", name, make, batch)


# Python 3.12 warns of forks of a process with threads, as pytest's may have by then; `python -m zoo` has none.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@forks
def test_an_exact_model_and_one_that_is_not_are_told_apart() -> None:
    found = run([entry("small", Small), entry("shrinking", Shrinking)], [0.5, 1.0], jobs=1, seconds=100)
    exact, other = found
    assert [proof.status for proof in exact.proofs] == ["exact", "exact"]
    assert other.status in ("refused", "wrong")


@forks
@pytest.mark.parametrize(("make", "reason"), [(crash, "SIGKILL"), (error, "no weights")])
def test_a_crash_is_a_row(make, reason) -> None:
    found = {row.name: row for row in run([entry("bad", make), entry("good", Small)], [0.5, 1.0], jobs=2, seconds=100)}
    assert [(proof.at, proof.status) for proof in found["bad"].proofs] == [(0.5, "failed"), (1.0, "failed")]
    assert all(reason in proof.reason for proof in found["bad"].proofs)
    assert found["good"].status == "exact"


@forks
@pytest.mark.parametrize(("make", "patience"), [(spin, 1000), (hang, 1)])
def test_the_end_of_its_time_is_a_row(make, patience, monkeypatch) -> None:
    monkeypatch.setattr("zoo.runner.PATIENCE", patience)
    (row,) = run([entry("bad", make)], [0.5], jobs=1, seconds=1)
    assert (row.status, row.proofs[0].reason) == ("timed out", "not done within 1 s of CPU time for all cuts")


@forks
def test_large_models_do_not_meet_in_memory(tmp_path: Path) -> None:
    def make(name: str) -> nn.Module:
        (tmp_path / name).touch()
        assert len(list(tmp_path.iterdir())) == 1
        time.sleep(0.5)
        (tmp_path / name).unlink()
        return Small()

    large = [Entry("own", name, partial(make, name), batch, parameters=10**12) for name in ("one", "two")]
    assert [row.status for row in run(large, [1.0], jobs=2, seconds=100)] == ["exact", "exact"]


@forks
def test_finished_rows_are_read_again_until_something_changes(tmp_path: Path, monkeypatch) -> None:
    path, small = tmp_path / "rows.jsonl", entry("small", partial(Small))
    monkeypatch.setattr("zoo.__main__.ROWS", path)
    (row,) = run([small], [0.5], jobs=1, seconds=100)
    rows.append(path, row)
    with path.open("a") as file:
        file.write('\n{"group": "own", "name": "cut sh')
    assert current([small], (0.5,)) == {("own", "small"): row}
    assert current([small], (0.5, 1.0)) == {}, "it was never asked about 1.0"
    monkeypatch.setattr("zoo.rows.versions", lambda: {"torch": "another"})
    assert current([small], (0.5,)) == {}
