"""Runs of a sweep that are trained at once: what they leave is what single runs leave, within rounding."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import test_flow_texts
import test_sweep
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pipeline.train.stacked
from pipeline.project import Project
from pipeline.runs.planned import list_runs, plan_runs
from pipeline.store import Reader
from pipeline.tasks import Head
from pipeline.train.checkpoint import claimed_checkpoint
from pipeline.workflows.encode import encode_project
from pipeline.workflows.sweep import SweepResult, sweep_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

PARAMS = Path("params.yaml")
CLOSE = 5e-5
"""Largest difference of losses, relative, and of weights, relative to the largest of their tensor: rounding adds up."""
STEADY = {"optimizer_options": {"eps": 1e-4}}
"""AdamW that makes no whole step of a gradient that is rounding alone."""
AT_ONCE = "epoch 1/2 of {} runs at once"

texts = test_flow_texts.folder


class Plain(tiny.ConvNet):
    """Without dropout; with a layer that nothing uses, and a weight that two layers share.

    It does not enlarge rounding: convolutions have no biases, whose gradients would be rounding alone before a batch
    norm, and no activation has a kink, on whose sides gradients differ.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        for block in self.blocks:
            block[0].bias, block[2] = None, nn.Tanh()
        self.dropout = nn.Identity()
        self.unused = nn.Linear(4, 4)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x).mean((2, 3))
        return self.classifier(self.second(self.first(x).tanh()))


def plain(head: Head) -> nn.Module:
    return Plain(head.size or 0)


class Bag(tiny.Leaky):
    """A text network without dropout: each token by itself, and the mean of a text's tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden, mask = self.embedding(input_ids), attention_mask.unsqueeze(-1)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def bag(head: Head) -> nn.Module:
    return Bag(head.size or 0)


class Branching(tiny.ConvNet):
    """Its way through the head depends on values, which is no program for many runs at once."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x).mean((2, 3))
        return self.classifier(x) if float(self.classifier.bias.detach().sum()) < 100 else self.classifier(-x)


def branching(head: Head) -> nn.Module:
    return Branching(head.size or 0)


def params(folder: Path, backbone: str = "test_stacked:plain", **train: Any) -> Path:
    cuts = {"cuts": [0.5, 1.0]}
    return tiny.write_params(folder, model={"backbone": backbone}, encode=cuts, train={"lr": 0.01, **STEADY, **train})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A project with 60 images, of which 45 are trained on, and two encoded cuts, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    encode_project(Project.load(params(tmp_path)))
    caplog.set_level(logging.INFO, logger="recycle")
    return tmp_path


def sweep(grid: dict[str, list[Any]], cuts: tuple[str, ...] = ("0.5",), **options: Any) -> SweepResult:
    return sweep_project(PARAMS, {}, list_runs(cuts, grid), **{"stacked": True, **options})


def compare_with_single_runs(result: SweepResult, count: int) -> None:
    """Train the runs of a sweep again, one by one, and compare what they leave."""
    assert len(result.finished) == count
    assert len({run.value for run in result.finished} | {run.history[0]["train/loss"] for run in result.finished}) > 1
    for run in result.finished:
        alone = train_project(Project.load(PARAMS, run.overrides), str(run.cut), "alone")
        (_, own, files), (_, other, other_files) = test_sweep.left(run.name), test_sweep.left("alone")
        assert files == other_files
        for row, row_alone in zip(own.pop("history"), other.pop("history"), strict=True):
            assert row == pytest.approx(row_alone, rel=CLOSE, abs=1e-6)
        assert own.pop("value") == pytest.approx(other.pop("value"), rel=CLOSE)
        assert own.pop("initial") == pytest.approx(other.pop("initial"), rel=CLOSE, nan_ok=True)
        assert own.pop("test") == pytest.approx(other.pop("test"), rel=CLOSE)
        reviews = own.pop("review"), other.pop("review")
        severities = [[mistake.pop("severity") for mistake in review["mistakes"]] for review in reviews]
        assert severities[0] == pytest.approx(severities[1], rel=CLOSE)
        assert [review["confusion"] for review in reviews] == [reviews[0]["confusion"]] * 2
        assert own == other
        weights, expected = (load_file(f"results/runs/{name}/model.safetensors") for name in (run.name, "alone"))
        assert list(weights) == list(expected)
        for name, tensor in expected.items():
            most = float(tensor.double().abs().max())
            assert torch.allclose(weights[name].double(), tensor.double(), rtol=0, atol=CLOSE * most), name
        assert alone.best_epoch == run.best_epoch


@pytest.mark.parametrize(
    ("train", "grid"),
    [
        ({}, {"train.lr": [0.01, 0.001], "train.seed": [0, 1]}),
        ({"schedule": "cosine", "warmup": 0.2}, {"train.head_lr": [0.1, 0.01], "train.weight_decay": [0.5, 0.0]}),
        (
            {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}, "max_grad_norm": 0.5},
            {"train.weight_decay": [0.1, 0.001], "train.seed": [0, 3]},
        ),
        ({"gradient_accumulation": 2, "epochs": 3, "batch_size": 8}, {"train.seed": [0, 1, 2, 3]}),
        ({"max_steps": 7, "eval_every": 2, "keep": "last"}, {"train.lr": [0.02, 0.002], "train.seed": [1, 2]}),
        ({"epochs": 6, "patience": 1}, {"train.lr": [1e-6, 0.02], "train.seed": [1, 2]}),
    ],
    ids=["rates", "decay", "SGD", "accumulation", "steps", "patience"],
)
def test_runs_of_a_stack_leave_what_single_runs_leave(
    folder: Path, caplog: pytest.LogCaptureFixture, train: dict[str, Any], grid: dict[str, list[Any]]
) -> None:
    """Batch norms with statistics of their own, tied weights and unused ones among the parameters."""
    params(folder, **train)
    result = sweep(grid)
    assert "of 4 runs at once" in caplog.text
    compare_with_single_runs(result, 4)


def test_a_batch_is_read_once_for_the_runs_of_a_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, reads = Reader.gather, []
    monkeypatch.setattr(Reader, "gather", lambda *args, **kwargs: (reads.append(1), gather(*args, **kwargs))[1])
    sweep({"train.lr": [0.01, 0.001]})
    of_two = len(reads)
    sweep({"train.lr": [0.02, 0.002, 0.03, 0.003, 0.04]})
    reviews = 5 - 2  # each run reads the validation samples, a batch, once more for its own review
    assert len(reads) - of_two == of_two + reviews


@pytest.mark.usefixtures("texts")
def test_seeds_with_other_numbers_of_runs_and_texts_of_other_lengths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="recycle")
    encode_project(test_flow_texts.project(tmp_path, "test_stacked:bag", encode={"cuts": [0.5]}, train=STEADY))
    rates: dict[str, list[Any]] = {"train.lr": [0.01, 0.02], "train.seed": [0, 1]}
    more: dict[str, Any] = {"cut": 0.5, "train.lr": 0.03, "train.seed": 1}
    result = sweep_project(PARAMS, {}, [*list_runs(["0.5"], rates), more], stacked=True)
    assert AT_ONCE.format(5) in caplog.text
    compare_with_single_runs(result, 5)


@pytest.mark.parametrize(
    ("backbone", "train", "reason"),
    [
        ("tiny:conv_net", {}, "the layers or the loss draw random numbers"),
        ("test_stacked:branching", {}, r"torch\.func\.vmap does not run these layers \(.*item\(\)"),
        ("test_stacked:plain", {"optimizer": "Adagrad"}, r"train\.optimizer is Adagrad, not AdamW or SGD"),
        ("test_stacked:plain", {"precision": "bf16"}, r"train\.precision is bf16"),
        ("test_stacked:plain", {"adapter": "lora"}, r"train\.adapter is set"),
        ("test_stacked:plain", {"shuffle": "window"}, "each seed would hold its own segments, which are read ahead"),
    ],
)
def test_runs_that_cannot_be_trained_at_once_are_trained_one_after_the_other(
    folder: Path, caplog: pytest.LogCaptureFixture, backbone: str, train: dict[str, Any], reason: str
) -> None:
    encode_project(Project.load(params(folder, backbone, **train)), replace_stores=True)
    result = sweep({"train.seed": [0, 1]})
    assert re.search(f"2 runs are trained one after the other: {reason}", caplog.text)
    test_sweep.compare_with_single_runs(result, 2)


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("MOST_PARAMETERS", r"the suffix has [\d,]+ parameters; the limit is 1,000"),
        ("MOST_FLOPS", r"a step has [\d.e+]+ floating-point operations; the limit is 1e\+03"),
    ],
)
def test_a_suffix_with_much_arithmetic_is_not_stacked(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    monkeypatch.setattr(pipeline.train.stacked, limit, 1000)
    sweep({"train.seed": [0, 1]})
    assert re.search(f"one after the other: {reason}", caplog.text)


def test_only_operations_after_the_cut_are_counted(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.train.stacked, "MOST_FLOPS", 100_000)
    result = sweep({"train.seed": [0, 1]}, ("1.0",))
    assert AT_ONCE.format(2) in caplog.text
    compare_with_single_runs(result, 2)


def test_a_wrong_result_of_vmap_is_found(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = pipeline.train.stacked.functional_call
    monkeypatch.setattr(pipeline.train.stacked, "functional_call", lambda *a, **k: call(*a, **k) * 1.01)
    result = sweep({"train.seed": [0, 1]})
    assert "one after the other: under torch.func.vmap, these layers return other values" in caplog.text
    test_sweep.compare_with_single_runs(result, 2)


def test_a_run_that_fails_does_not_end_its_stack(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = sweep({"train.lr": [0.01, 1e15, 0.001]})
    assert AT_ONCE.format(3) in caplog.text
    assert list(result.failed) == ["0.5-1000000000000000.0"]
    assert "the training loss is nan in epoch 1/2; lower train.lr (now 1" in result.failed["0.5-1000000000000000.0"]
    compare_with_single_runs(result, 2)


def test_a_killed_stack_begins_again_without_the_runs_that_it_saved(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = pipeline.train.stacked.save_trained, list[Path]()

    def dying(checkpoint: Path, *args: Any) -> None:
        if len(saved) == 1:
            raise test_sweep.Killed
        saved.append(checkpoint)
        save(checkpoint, *args)

    monkeypatch.setattr(pipeline.train.stacked, "save_trained", dying)
    with pytest.raises(test_sweep.Killed):
        sweep({"train.seed": [0, 1, 2]})
    assert not list(folder.glob("results/runs/*/run.json"))
    monkeypatch.setattr(pipeline.train.stacked, "save_trained", save)
    caplog.clear()
    result = sweep({"train.seed": [0, 1, 2]})
    assert AT_ONCE.format(2) in caplog.text
    assert not any(line.startswith("epoch 1/2: ") for line in caplog.messages), "the saved run is only recorded"
    compare_with_single_runs(result, 3)
    assert not list((folder / ".recycle/checkpoints").iterdir())


def test_a_run_that_another_process_trains_is_left_to_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (first, *_) = plan_runs(PARAMS, {}, list_runs(["0.5"], {"train.seed": [0, 1, 2]}))
    with claimed_checkpoint(first.checkpoint):
        result = sweep({"train.seed": [0, 1, 2]})
    assert AT_ONCE.format(2) in caplog.text
    assert ([run.name for run in result.finished], result.elsewhere) == (["0.5-1", "0.5-2"], ["0.5-0"])


def test_processes_share_the_stacks(folder: Path) -> None:
    params(folder, epochs=40)
    started = tiny.recycle(folder, "sweep", "--cut", "0.5", "--grid", "train.seed=0,1,2,3", "--jobs", "2", "--stacked")
    said, _ = started.communicate(timeout=240)
    assert started.returncode == 0, said
    assert said.count("epoch 1/40 of 2 runs at once") == 2
    assert said.count(" after epoch ") == 4, "no run is trained twice"
    assert "epoch 1/40: " not in said
