"""Several processes train one run: torchrun starts two, which leave what one process leaves."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
from accelerate import Accelerator
from safetensors.torch import load_file
from test_flow_words import ASKED, TAGGED, write_words

from pipeline.errors import ConfigError, TrainError
from pipeline.project import Project
from pipeline.runs.record import identity, provenance
from pipeline.train.checkpoint import exclusive_checkpoint
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")
WEIGHTS, RUN = "results/runs/shared/model.safetensors", "results/runs/shared/run.json"
EPOCHS = 20
ROUNDING = ("key.bias", "qa_outputs.bias")
"""Parameters whose gradient is 0 but for rounding, of which Adam makes steps: the softmax after them is blind to them.
"""


def torchrun(folder: Path, *args: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start as many processes of a Python program, in a session of their own."""
    return tiny.python(folder, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *args)


def images(folder: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """45 images to train on, and 15 to score."""
    tiny.write_images(folder / "photos", range(20))
    return {"model": {"backbone": "ranks:smooth_net"}, **changes}


def texts(folder: Path, given: dict[str, Any] | None = None, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sentences and questions for a BERT without dropout; pairs of texts."""
    write_words(folder)
    draw = np.random.default_rng(0)
    lines = [
        {
            "q": " ".join([w, *draw.choice(WORDS, draw.integers(1, 6))]),
            "a": f"{w} {w}",
            "split": "test" if i > 44 else "train",
        }
        for i, w in enumerate(WORDS * 11)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, dict[str, Any]] = {
        "model": {"backbone": f"hf:{folder.parent / 'bert'}"},
        "preprocess": {"kind": "text", "image_size": None},
    }
    for section in (given or {}, changes):
        settings |= {name: settings.get(name, {}) | section[name] for name in section}
    return settings


PAIRS = {
    "data": {
        "source": "pairs",
        "path": "pairs.jsonl",
        "validation": 0.3,
        "anchor": "q",
        "positive": "a",
        "split": "split",
    },
    "task": {"kind": "similarity"},
}
STEPS = {"gradient_accumulation": 3, "schedule": "cosine", "warmup": 0.2, "max_grad_norm": 0.5}

CASES: dict[str, Callable[[Path], dict[str, dict[str, Any]]]] = {
    # 45 samples in batches of 11: the last one has a single sample, which both processes get
    "classes": lambda f: images(f, train={"batch_size": 11, **STEPS}, task={"class_weights": "balanced"}),
    # seed 1: with 0 two of the 13 held-out embeddings are equally far but for rounding, and which is nearer differs
    "proxies": lambda f: images(
        f, task={"kind": "similarity", "loss": "proxy_anchor", "layers": [6]}, train={"seed": 1}
    ),
    "centres": lambda f: images(
        f, task={"kind": "similarity", "loss": "center", "layers": [6]}, train={"max_steps": 5, "eval_every": 2}
    ),
    "tags": lambda f: texts(f, TAGGED, train={"batch_size": 7, "group_by_length": True}),
    "answers": lambda f: texts(f, ASKED, train={"batch_size": 9, "adapter": "lora"}),
    "pairs": lambda f: texts(f, PAIRS, task={"memory": 27, "symmetric": True}, train={"batch_size": 5}),
    "towers": lambda f: texts(
        f, PAIRS, task={"memory": 30}, train={"batch_size": 7}, towers={"positive": {"layers": [8]}}
    ),
}


@pytest.fixture
def folders(tmp_path: Path, text_folder: Path) -> dict[str, Path]:
    """A project for each case, encoded, in a folder of its own."""
    config = json.loads((text_folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (text_folder / "config.json").write_text(json.dumps(config))
    return {name: tmp_path / name for name in CASES}


def test_two_processes_leave_what_one_leaves(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.chdir(folder)
        tiny.write_params(folder, **{"encode": {"cuts": [0.5]}, **CASES[name](folder)})
        project = Project.load(Path("params.yaml"))
        assert encode_project(project)
        alone[name] = train_project(project, "0.5", "alone")
    started = torchrun(folders["classes"], str(Path(tiny.TESTS, "ranks.py")), *map(str, folders.values()))
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    assert said.count("run shared") == 0
    for name, folder in folders.items():
        runs = folder / "results/runs"
        one, two = (load_file(runs / run / "model.safetensors") for run in ("alone", "shared"))
        assert one.keys() == two.keys()
        apart = {key: float((one[key] - two[key]).abs().max()) for key in one if not key.endswith(ROUNDING)}
        assert max(apart.values()) < 1e-5, (name, apart)
        shared = json.loads((runs / "shared/run.json").read_text())
        history = shared["history"]
        assert shared["test"] == pytest.approx(alone[name].test, abs=1e-5), name
        assert bool(shared["test"]) == (name in ("pairs", "towers"))
        for expected, row in zip(alone[name].history, history, strict=True):
            assert row == pytest.approx(expected | {"train/seconds": row["train/seconds"]}, abs=1e-5), name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images for a network with batch norm and dropout, encoded, in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    settings = {"encode": {"cuts": [0.5]}, "train": {"epochs": EPOCHS, "batch_size": 16}}
    assert encode_project(Project.load(tiny.write_params(tmp_path, **settings)))
    return tmp_path


def test_a_killed_process_ends_the_others_and_the_rerun_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = torchrun(folder, "-m", "stages.cli", "train", "--cut", "0.5", "--name", "shared")
    while not (found := list(folder.glob(".recycle/checkpoints/*/latest/progress.json"))):
        assert started.poll() is None
        time.sleep(0.01)
    os.kill(process_of_rank(started, 1), signal.SIGKILL)
    said, _ = started.communicate(timeout=300)
    assert started.returncode != 0
    assert said.count("2 batch norms, such as BatchNorm2d, take the statistics of each process's own") == 1
    done = json.loads(found[0].read_text())["history"]
    assert 1 <= len(done) < EPOCHS
    assert not (folder / RUN).exists()
    undisturbed, damaged, one = (copy_of(folder, name) for name in ("undisturbed", "damaged", "one"))
    shutil.copytree(folder / ".recycle", one / ".recycle")
    chunk = next((damaged / "data/activations/0.5").glob("*/state.*/c.*"))
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 4
    chunk.write_bytes(content)
    started = torchrun(folder, str(Path(tiny.TESTS, "ranks.py")), *map(str, (folder, undisturbed, damaged)))
    said, _ = started.communicate(timeout=300)
    assert (folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    histories = [json.loads((again / RUN).read_text())["history"] for again in (folder, undisturbed)]
    assert [row["train/loss"] for row in histories[0]] == [row["train/loss"] for row in histories[1]]
    # With another number of processes it goes on too.
    monkeypatch.chdir(one)
    history = train_project(Project.load(Path("params.yaml")), "0.5", "shared").history
    assert len(history) == EPOCHS
    assert history[: len(done)] == done
    # One process meets the damaged bytes. It says so, and ends the other, which says nothing.
    assert started.returncode != 0
    assert said.count("CorruptStoreError: ") == 1
    assert not (damaged / RUN).exists()


def copy_of(folder: Path, name: str) -> Path:
    """Return a copy of an encoded project without what its runs left."""
    copy = folder / name
    shutil.copytree(folder / "data", copy / "data")
    shutil.copy(folder / "params.yaml", copy)
    return copy


def process_of_rank(started: subprocess.Popen[str], rank: int) -> int:
    """Return the process that torchrun started as `rank`."""
    for child in psutil.Process(started.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError("torchrun has no such process")


def test_each_process_needs_a_unit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny.files(folder)
    monkeypatch.setattr(Accelerator, "num_processes", 32)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 16, and 32 processes share it out; raise it"):
        train_project(Project.load(Path("params.yaml")), "0.5")
    assert tiny.files(folder) == before


def test_one_run_is_not_trained_twice_at_a_time(folder: Path) -> None:
    project = Project.load(Path("params.yaml"))
    checkpoint = project.work_dir / "checkpoints" / identity(provenance(project, 0.5))
    with (
        exclusive_checkpoint(checkpoint),
        pytest.raises(TrainError, match="is in use: another process trains a run with these"),
    ):
        train_project(project, "0.5", "other")
    assert len(train_project(project, "0.5", "other").history) == EPOCHS
