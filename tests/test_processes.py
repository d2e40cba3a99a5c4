"""Several processes train one run: torchrun starts two, which leave what one process leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_flow_words import ASKED, TAGGED, write_words

from pipeline.flow import encode_project, train_project
from pipeline.project import Project

WORDS = ("one", "two", "three", "good", "bad")
ROUNDING = ("key.bias",)
"""Parameters whose gradient is 0 but for rounding, of which Adam makes steps: attention is blind to them."""


def torchrun(folder: Path, *args: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start as many processes of a Python program, in a session of their own."""
    environment = os.environ | {"PYTHONPATH": tiny.IMPORTS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def images(folder: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """45 images to train on, and 15 to score."""
    tiny.write_images(folder / "photos", range(20))
    return {"model": {"backbone": "ranks:smooth_net"}, **changes}


def texts(folder: Path, given: dict[str, Any] | None = None, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sentences and questions for a BERT without dropout; pairs of texts."""
    write_words(folder)
    draw = np.random.default_rng(0)
    lines = [{"q": " ".join([w, *draw.choice(WORDS, draw.integers(1, 6))]), "a": f"{w} {w}"} for w in WORDS * 10]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, dict[str, Any]] = {
        "model": {"backbone": f"hf:{folder.parent / 'bert'}"},
        "preprocess": {"kind": "text", "image_size": None},
    }
    for section in (given or {}, changes):
        settings |= {name: settings.get(name, {}) | section[name] for name in section}
    return settings


PAIRS = {
    "data": {"source": "pairs", "path": "pairs.jsonl", "validation": 0.3, "anchor": "q", "positive": "a"},
    "task": {"kind": "similarity"},
}
STEPS = {"gradient_accumulation": 3, "schedule": "cosine", "warmup": 0.2, "max_grad_norm": 0.5}

CASES: dict[str, Callable[[Path], dict[str, dict[str, Any]]]] = {
    # 45 samples in batches of 11: the last one has a single sample, which both processes get
    "classes": lambda f: images(f, train={"batch_size": 11, **STEPS}, task={"class_weights": "balanced"}),
    "proxies": lambda f: images(f, task={"kind": "similarity", "loss": "proxy_anchor", "layers": [6]}),
    "centres": lambda f: images(f, task={"kind": "similarity", "loss": "center", "layers": [6]}),
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
        print(name, max(apart.values()), {k: v for k, v in apart.items() if v > 1e-5})
        written = json.loads((runs / "shared/run.json").read_text())
        for expected, row in zip(alone[name].history, written["history"], strict=True):
            for score, value in expected.items():
                if score != "train/seconds":
                    print(score, row[score], value)
