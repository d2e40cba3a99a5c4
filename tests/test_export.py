"""An exported model is the one that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from pipeline.errors import DataError
from pipeline.export import ParityError, export_run
from pipeline.flow import encode_project, train_project
from pipeline.project import Project
from pipeline.store import Reader, Store


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a finished run at cut 0.5."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    loaded = Project.load(tiny.write_params(tmp_path))
    encode_project(loaded)
    train_project(loaded, "0.5")
    return loaded


def test_the_state_dict_loads_into_the_plain_network(project: Project, tmp_path: Path) -> None:
    parity = export_run(project, "0.5", tmp_path / "model")
    assert parity.samples == 32
    assert parity.merged < 1e-5
    assert parity.stored < 2e-2
    network = tiny.ConvNet(3)
    network.load_state_dict(load_file(tmp_path / "model/model.safetensors"))
    trained = load_file("results/runs/0.5/model.safetensors")
    own = network.state_dict()
    assert trained
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.items())
    assert json.loads((tmp_path / "model/parity.json").read_text())["samples"] == 32
    assert json.loads((tmp_path / "model/backbone.json").read_text())["backbone"] == "tiny:conv_net"


def test_nothing_is_overwritten(project: Project, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("keep me")
    with pytest.raises(DataError, match="is not empty"):
        export_run(project, "0.5", tmp_path / "model")


def test_a_run_that_was_never_trained_is_named(project: Project, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1\.0/run\.json does not exist; train it"):
        export_run(project, "1.0", tmp_path / "model")


def test_states_that_are_not_the_networks_are_found_out(project: Project, tmp_path: Path) -> None:
    """The proof can fail: here every stored state is halved, and sealed as if it had been made so."""
    store = Store.open(Path("data/activations/0.5"))
    keys, reader = store.keys(), Reader(store.path)
    for segment in store.segments():
        tensors = {
            name: tensor.take(np.arange(len(tensor))) for name, tensor in reader.segment(segment).tensors.items()
        }
        states = {name: tensor / 2 for name, tensor in tensors.items() if name.startswith("state.")}
        shutil.rmtree(store.path / segment)
        store.write_segment(keys[: len(next(iter(tensors.values())))], tensors | states)
        keys = keys[len(next(iter(tensors.values()))) :]
    with pytest.raises(ParityError, match="nothing was exported"):
        export_run(project, "0.5", tmp_path / "model")
    assert not (tmp_path / "model").exists()
