"""Choosing a cut: costs, expected speed-ups, what is sensible, and the table that `recycle cuts` prints."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import nn

from pipeline.errors import ConfigError, RecyclingError
from pipeline.models.backbone import ArrayPreprocess
from pipeline.project import Project
from pipeline.project.model_example import draw_inputs
from pipeline.split import Candidate, Cut
from pipeline.workflows.cuts import choose, find_sensible, measure, speed_ups, table
from pipeline.workflows.encode import encode_project
from stages import cli


class Chain(nn.Module):
    """Four layers of 32 operations per sample, and a head of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def place(blocks: int, flops: int, state: int | None, parameters: int = 0) -> Candidate:
    """A place in a model of 10 blocks, 100 operations and 100 parameters."""
    return Candidate(Cut(f"block{blocks}", 0, blocks, 10), flops, 100 - flops, parameters, state)


def sensible(*places: Candidate) -> list[int]:
    return sorted(item.cut.blocks_before for item in find_sensible(places, 100))


def invoke(*args: str) -> str:
    result = CliRunner().invoke(cli.recycle, ["cuts", *args])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(3))
    tiny.write_params(tmp_path)
    return tmp_path


def test_costs_and_speed_ups_of_a_network_counted_by_hand() -> None:
    choices = choose(Chain(), {"x": torch.randn(3, 4)})
    assert [choice.at for choice in choices] == [0, "layers.1", "layers.2", "layers.3", "head"]
    assert [choice.blocks for choice in choices] == [0, 1, 2, 3, 4]
    assert [choice.blocks_share for choice in choices] == [0, 0.25, 0.5, 0.75, 1]
    half = choices[2]
    assert half.parameters_share == 40 / 90
    assert half.flops_share == 64 / 144
    assert half.state_bytes == 8
    assert half.over_full == pytest.approx(3 * 144 / (3 * 80))
    assert half.over_frozen == pytest.approx((64 + 3 * 80) / (3 * 80))
    assert (choices[0].over_full, choices[0].over_frozen) == (1, 1)


def test_no_operation_after_the_cut_gives_no_speed_up() -> None:
    assert speed_ups(100, 0) == (None, None)


def test_the_smallest_state_stands_for_its_likes() -> None:
    assert sensible(place(0, 0, 50), place(4, 40, 90), place(5, 50, 30), place(6, 60, 60)) == [5]


def test_a_smaller_state_far_deeper_stands_for_nothing_shallower() -> None:
    assert sensible(place(0, 0, 50), place(4, 40, 90), place(9, 90, 10)) == [4, 9]


def test_a_smaller_state_far_shallower_stands_for_nothing_deeper() -> None:
    assert sensible(place(0, 0, 50), place(2, 20, 10), place(6, 60, 40)) == [2, 6]


def test_of_equal_states_steps_remain() -> None:
    places = [place(blocks, 10 * blocks, 0 if blocks == 0 else 20) for blocks in range(10)]
    assert sensible(*places) == [3, 5, 7, 8, 9] == sensible(*reversed(places))


@pytest.mark.parametrize(("state", "expected"), [(50, []), (49, [1])])
def test_what_saves_little_must_store_less_than_the_inputs(state: int, expected: list[int]) -> None:
    assert sensible(place(0, 0, 50), place(1, 9, state)) == expected
    assert sensible(place(0, 0, 50), place(1, 10, state)) == [1]


def test_what_cannot_be_trained_or_split_is_not_sensible() -> None:
    refused = Candidate(Cut("block5", 0, 5, 10), 50, 50, refused="random")
    assert sensible(place(0, 0, 50), refused, place(10, 100, 10, 100)) == []


def test_a_refusal_is_told_below_the_table() -> None:
    class Noisy(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(2)

    lines = table(choose(Noisy(), {"x": torch.randn(3, 4)})).splitlines()
    assert len(lines) == 1 + 5 + 5
    assert lines[2].split() == ["layers.1", "1", "25%", "-", "22.2%", "-", "-", "-"]
    assert lines[-1].startswith("head is refused: ")
    assert "random" in lines[-1]


def test_measuring_times_the_sensible_cuts() -> None:
    model, example = Chain(), {"x": torch.randn(3, 4)}
    for choice in measure(model, example, choose(model, example)):
        assert (choice.measured_over_full is not None) == choice.sensible
        assert choice.measured_over_frozen is None or choice.measured_over_frozen > 0.5


@pytest.mark.parametrize(
    ("backbone", "options", "last", "blocks"),
    [
        ("torchvision:resnet18", ["--image-size", "32"], "fc", 8),
        ("timm:test_vit", [], "norm", 6),
        ("tiny:conv_net", ["--image-size", "16", "--classes", "3"], "classifier", 8),
    ],
)
def test_a_model_by_its_name(backbone: str, options: list[str], last: str, blocks: int) -> None:
    found: list[dict[str, Any]] = json.loads(invoke(backbone, "--json", *options))
    assert [choice["blocks"] for choice in found] == list(range(blocks + 1))
    assert (found[0]["at"], found[-1]["at"]) == (0, last)
    assert all(choice["refused"] is None for choice in found)
    assert [choice["flops_share"] for choice in found] == sorted(choice["flops_share"] for choice in found)
    assert any(choice["sensible"] for choice in found)


def test_texts_are_drawn_at_the_length_asked_for(text_folder: Path) -> None:
    assert "input_ids (3, 12)" in invoke(f"hf:{text_folder}", "--length", "12", "--batch", "3")
    assert "input_ids (2, 16)" in invoke(f"hf:{text_folder}"), "the network has no more positions"


def test_the_model_and_the_data_of_params_yaml(project: Path) -> None:
    said = invoke()
    assert said.startswith("example: x (2, 3, 16, 16)\n")
    lines = [line.removeprefix("*").split() for line in said.splitlines()[3:12]]
    assert [line[0] for line in lines] == [
        "0",
        "blocks.0.1",
        *(f"blocks.{i}.{j}" for i in (1, 2, 3) for j in (0, 1)),
        "classifier",
    ]
    found = json.loads(invoke("--json", "--image-size", "8"))
    assert found[0]["state_bytes"] == 3 * 8 * 8 * 2
    assert found[-1]["parameters_share"] == pytest.approx(
        1 - (12 * 3 + 3) / sum(p.numel() for p in tiny.ConvNet(3).parameters())
    )


def test_without_the_data_the_example_is_drawn(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    (project / "photos").rename(project / "elsewhere")
    assert json.loads(invoke("--json", "--classes", "7"))[-1]["at"] == "classifier"
    assert "nothing is there" in caplog.text
    assert "7 classes are assumed" in caplog.text


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("nonsense", r"^cuts: model.backbone: 'nonsense': expected torchvision:NAME"),
        ("timm:vit_tiny_patch16_225", r"timm has no such network \(near: vit_tiny_patch16_224"),
    ],
)
def test_an_unknown_model_is_told_in_one_message(backbone: str, message: str) -> None:
    with pytest.raises(RecyclingError, match=message):
        invoke(backbone)


def test_inputs_of_unknown_shape_are_not_drawn() -> None:
    with pytest.raises(ConfigError, match="only data shows what they look like"):
        draw_inputs(ArrayPreprocess("x"), 2, 8)


def test_one_place_under_two_names_is_told(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_params(project, encode={"cuts": [0.5, 1.0, "blocks.2"]})
    encode_project(Project.load(project / "params.yaml"))
    assert "0.5 and 'blocks.2', which name one place: blocks.2.0, after 4 of 8 blocks; keep one" in caplog.text
