"""The pipeline on an accelerator gives what it gives on the CPU, mixes no devices, and does run there.

The accelerator is that of `accelerator/device.cpp`; registering it changes a whole process, so its commands run in
processes of their own.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_flow_texts import WORDS

pytestmark = pytest.mark.slow

LONG = ["train", "--cut", "0.5", "--set", "train.epochs=12", "--name", "killed"]
IMAGES = [
    ["encode"],
    ["train", "--cut", "0"],
    ["train", "--cut", "0.5"],
    ["train", "--cut", "1.0"],
    ["train", "--cut", "0.5", "--set", "train.residency=host", "--name", "host"],
    ["train", "--cut", "0.5", "--set", "train.precision=bf16", "--name", "bf16"],
    ["train", "--cut", "0.5", "--set", "train.adapter=lora", "--name", "lora"],
    ["predict", "--model", "0.5", "--output", "said.jsonl"],
    ["export", "plain", "--run", "0.5"],
    ["store", "error", "--cut", "0.5"],
]
RUNS = ("0", "0.5", "1.0", "host", "lora", "killed")
TOWERS = [["encode"], ["train", "--cut", "0.5"]]
TIED = [["encode"], ["train", "--cut", "0"]]


@pytest.fixture(scope="module")
def folders(build: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same projects, after the same commands, on either device; on the accelerator one run was killed before.

    The accelerator has streams; one without them has encoded the projects and trained nothing.
    """
    homes = {name: tmp_path_factory.mktemp(name) for name in ("cpu", "accelerator", "streamless")}
    for home in homes.values():
        write_projects(home)
    device = {"ACCELERATOR_BUILD": str(build), "ACCELERATOR_STREAMS": "1"}
    projects = {"images": [*IMAGES, LONG], "towers": TOWERS, "tied": TIED}
    on_cpu = drive(homes["cpu"], projects)
    kill_after_an_epoch(homes["accelerator"], device)
    on_device = drive(homes["accelerator"], projects, **device)
    streamless = drive(homes["streamless"], {name: [["encode"]] for name in projects}, ACCELERATOR_BUILD=str(build))
    said = [(started, *started.communicate(timeout=300)) for started in (on_cpu, on_device, streamless)]
    for home, (started, text, _) in zip(homes.values(), said, strict=True):
        assert started.returncode == 0, text
        (home / "said").write_text(text)
    return homes


UNFUSED = {"optimizer_options": {"fused": False}}
"""The accelerator has no fused steps, whose rounding is another."""


def write_projects(home: Path) -> None:
    for name in ("images", "towers", "tied"):
        (home / name).mkdir()
    tiny.write_images(home / "images/photos", range(8))
    tiny.write_params(home / "images", train=UNFUSED)
    tiny.write_images(home / "tied/photos", range(4))
    tiny.write_params(
        home / "tied", model={"backbone": "accelerator.drive:tied_net"}, encode={"cuts": [0]}, train=UNFUSED
    )
    lines = [{"q": f"{one} {two}", "a": f"{two} {one}"} for one in WORDS for two in WORDS]
    (home / "towers/pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny.write_text_network(home / "bert")
    path = tiny.write_params(
        home / "towers",
        data={"source": "pairs", "path": "pairs.jsonl", "validation": 0.3, "anchor": "q", "positive": "a"},
        model={"backbone": "hf:../bert"},
        preprocess={"kind": "text", "image_size": None},
        task={"kind": "similarity", "memory": 40},
        encode={"cuts": [0.5]},
        train=UNFUSED,
    )
    path.write_text(path.read_text() + "towers: {positive: {layers: [8]}}\n")


def drive(home: Path, commands: dict[str, list[list[str]]], **environment: str) -> subprocess.Popen[str]:
    given = [part for name, own in commands.items() for part in (str(home / name), json.dumps(own))]
    return tiny.python(home, "-m", "accelerator.drive", *given, **environment)


def kill_after_an_epoch(home: Path, environment: dict[str, str]) -> None:
    started = drive(home, {"images": [["encode"], LONG]}, **environment)
    while not list(home.glob("images/.recycle/checkpoints/*/latest/progress.json")):
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    assert not (home / "images/results/runs/killed/run.json").exists()


def run_of(home: Path, project: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / project / "results/runs" / name / "run.json").read_text())
    found["history"] = [{k: v for k, v in row.items() if k != "train/seconds"} for row in found["history"]]
    return found


def both(folders: dict[str, Path], project: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    on_cpu, on_device = (run_of(home, project, name) for home in (folders["cpu"], folders["accelerator"]))
    return on_cpu, on_device


@pytest.mark.parametrize("device", ["accelerator", "streamless"])
@pytest.mark.parametrize("project", ["images", "towers", "tied"])
def test_states_and_recipes_are_the_cpu_s(folders: dict[str, Path], project: str, device: str) -> None:
    on_cpu, on_device = (tiny.files(folders[name] / project / "data/activations") for name in ("cpu", device))
    assert len(on_cpu) > 3
    assert on_cpu.keys() == on_device.keys()
    for name, content in on_cpu.items():  # a probe is not rounded to 16 bits as states are
        assert on_device[name] == content or "/probe/" in name, name


@pytest.mark.parametrize("name", RUNS)
def test_losses_scores_and_weights_are_the_cpu_s(folders: dict[str, Path], name: str) -> None:
    on_cpu, on_device = both(folders, "images", name)
    assert on_device["history"] == on_cpu["history"]
    assert (on_device["initial"], on_device["value"]) == (on_cpu["initial"], on_cpu["value"])
    file = f"images/results/runs/{name}/model.safetensors"
    expected, found = (load_file(folders[device] / file) for device in ("cpu", "accelerator"))
    if name in ("0", "0.5"):
        assert sum("running_mean" in key for key in expected) == (4 if name == "0" else 2)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_training_moves_the_loss(folders: dict[str, Path]) -> None:
    history = run_of(folders["accelerator"], "images", "killed")["history"]
    assert history[-1]["train/loss"] < history[0]["train/loss"]


def test_mixed_precision_is_close_to_the_cpu_s(folders: dict[str, Path]) -> None:
    for expected, row in zip(*(found["history"] for found in both(folders, "images", "bf16")), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=0.05)
    plain = run_of(folders["accelerator"], "images", "0.5")["history"]
    assert plain != run_of(folders["accelerator"], "images", "bf16")["history"]


@pytest.mark.parametrize(("project", "name"), [("towers", "0.5"), ("tied", "0")])
def test_towers_and_shared_weights_train_as_on_the_cpu(folders: dict[str, Path], project: str, name: str) -> None:
    on_cpu, on_device = both(folders, project, name)
    for expected, found in zip(on_cpu["history"], on_device["history"], strict=True):
        # Sums depend on the alignment of memory: the last bit of a loss may differ.
        assert found == pytest.approx(expected, rel=1e-6)
    assert on_cpu["history"][0]["train/loss"] != on_cpu["history"][1]["train/loss"]


def test_predictions_and_exports_are_the_cpu_s(folders: dict[str, Path]) -> None:
    homes = [folders[device] for device in ("cpu", "accelerator")]
    on_cpu, on_device = (home / "images/said.jsonl" for home in homes)
    assert on_device.read_text() == on_cpu.read_text()
    expected, found = (load_file(home / "images/plain/model.safetensors") for home in homes)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_commands_run_on_the_accelerator(folders: dict[str, Path]) -> None:
    counts = {name: json.loads((home / "said").read_text().splitlines()[-1]) for name, home in folders.items()}
    operations, copies, beside = counts["accelerator"]
    assert counts["cpu"] == [0, 0, 0]
    assert operations > 10_000
    assert copies > 500
    assert beside > 50
    assert counts["streamless"][0] > 500
    assert counts["streamless"][2] == 0
