"""Weights are matched by name, or by position where every shape agrees; anything else is refused."""

import logging
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pipeline
from pipeline.errors import ConfigError, ModelError
from pipeline.files import sha256
from pipeline.models.config import ModelConfig
from pipeline.models.weights import CheckpointLayout, fit_weights, read_weights, seeded


def build(classes: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), pool=nn.Flatten()
    )
    if classes:
        layers["fc"] = nn.Linear(4, classes)
    return nn.Sequential(layers)


def fit(state: dict[str, Tensor], classes: int = 2) -> nn.Module:
    model = build(classes)
    fit_weights(model, state, CheckpointLayout.of(build), "weights.pt")
    return model


@pytest.fixture
def state() -> dict[str, Tensor]:
    with seeded(7):
        return dict(build(2).state_dict())


def test_classifier_is_found_by_its_size() -> None:
    assert CheckpointLayout.of(build).head == {"fc.weight", "fc.bias"}


def test_by_name(state: dict[str, Tensor]) -> None:
    shuffled = dict(reversed(state.items()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in fit(shuffled).state_dict().items())


def test_another_number_of_classes_keeps_the_fresh_classifier(state: dict[str, Tensor]) -> None:
    model = fit(state, classes=5).state_dict()
    assert torch.equal(model["conv.weight"], state["conv.weight"])
    assert model["fc.weight"].shape == (5, 4)


def test_no_classifier_on_either_side(state: dict[str, Tensor]) -> None:
    assert torch.equal(fit(state, classes=0).state_dict()["norm.bias"], state["norm.bias"])
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("fc")}
    assert torch.equal(fit(headless).state_dict()["conv.bias"], state["conv.bias"])


def test_by_position(state: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    renamed = {f"_layer{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}
    with caplog.at_level(logging.WARNING):
        model = fit(renamed, classes=3).state_dict()
    assert torch.equal(model["norm.running_var"], state["norm.running_var"])
    assert torch.equal(model["conv.weight"], state["conv.weight"])
    assert "matched by position" in caplog.text


def test_position_needs_kinds_to_agree(state: dict[str, Tensor]) -> None:
    names = [name for name in state if name not in ("norm.weight", "norm.bias")]
    names[2:2] = ["norm.bias", "norm.weight"]
    with pytest.raises(ModelError, match=r"missing: conv\.weight"):
        fit({f"x.{name}": state[name] for name in names})


def test_a_count_of_batches_may_be_missing(state: dict[str, Tensor]) -> None:
    state.pop("norm.num_batches_tracked")
    assert torch.equal(fit(state).state_dict()["norm.weight"], state["norm.weight"])


def test_all_faults_are_told(state: dict[str, Tensor]) -> None:
    state["extra"] = state.pop("conv.bias")
    state["norm.weight"] = torch.ones(9)
    with pytest.raises(ModelError) as error:
        fit(state)
    for fault in ("weights.pt", "missing: conv.bias", "unexpected: extra", r"norm.weight [9] for [4]"):
        assert fault in str(error.value)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_files(tmp_path: Path, state: dict[str, Tensor], suffix: str, wrapped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{name}": t for name, t in state.items()}, "epoch": 3} if wrapped else state, path
        )
    config = ModelConfig(backbone="timm:x", weights=str(path), sha256=sha256(path))
    assert read_weights(config).keys() == state.keys()
    with pytest.raises(ConfigError, match=r"model\.sha256 is 00"):
        read_weights(config.model_copy(update={"sha256": "0" * 64}))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import sys; sys.modules['pipeline'].broken = True",)


def test_pickled_objects_are_never_run(tmp_path: Path) -> None:
    torch.save({"a": Payload()}, tmp_path / "w.pt")
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("w.pt", "w.bin"):
        with pytest.raises(ModelError, match="never unpickled"):
            read_weights(ModelConfig(backbone="timm:x", weights=str(tmp_path / name)))
    assert not hasattr(pipeline, "broken")


@pytest.mark.parametrize(("name", "content"), [("w.pt", b""), ("w.safetensors", b"abc"), ("w.pt", b"abc")])
def test_broken_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.weights"):
        read_weights(ModelConfig(backbone="timm:x", weights=str(tmp_path / name)))


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "w.h5").touch()
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, \.pth"):
        read_weights(ModelConfig(backbone="timm:x", weights=str(tmp_path / "w.h5")))
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds list; expected a state dict"):
        read_weights(ModelConfig(backbone="timm:x", weights=str(tmp_path / "w.pt")))
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="no tensors by name, but epoch"):
        read_weights(ModelConfig(backbone="timm:x", weights=str(tmp_path / "w.pt")))


def test_seeded_leaves_the_outside_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(5):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(5):
        assert torch.equal(torch.rand(2), inside)
