"""What every layer of a head promises, and how it is written in params.yaml."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.tasks import TaskConfig
from pipeline.tasks.heads import LAYERS, Layer, last_width, parse
from pipeline.tasks.layers import build_head

WIDTH = 6
EXAMPLES: dict[str, list[tuple[Layer, int]]] = {
    "identity": [("identity", WIDTH)],
    "linear": [({"linear": 4}, 4), ({"linear": {"width": 9}}, 9), (3, 3)],
    "mlp": [({"mlp": [8, 5]}, 5), ({"mlp": {"widths": [8, 7, 2], "activation": "gelu", "dropout": 0.1}}, 2)],
    "gated": [("gated", WIDTH), ({"gated": {}}, WIDTH)],
    "skip": [("skip", WIDTH), ({"skip": {"dropout": 0.3}}, WIDTH), ({"skip": 0.3}, WIDTH)],
    "widening": [("widening", WIDTH), ({"widening": 2}, WIDTH), ({"widening": {"activation": "silu"}}, WIDTH)],
    "dropout": [({"dropout": 0.5}, WIDTH)],
    "layer_norm": [("layer_norm", WIDTH)],
    "activation": [({"activation": "tanh"}, WIDTH)],
}
ALL = [(layer, width) for examples in EXAMPLES.values() for layer, width in examples]


def made(*layers: Layer, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_head(layers, WIDTH)


def test_every_layer_is_tried() -> None:
    assert EXAMPLES.keys() == LAYERS.keys()


@pytest.mark.parametrize(("layer", "width"), ALL, ids=str)
def test_a_layer(layer: Layer, width: int) -> None:
    head, inputs = made(layer), torch.randn(5, WIDTH, requires_grad=True)
    torch.nn.utils.vector_to_parameters(torch.randn(999), head.parameters())  # some start at zero
    output = head.eval()(inputs)
    assert output.shape == (5, width)
    assert parse(layer).width_after(WIDTH) == width
    output.square().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in head.parameters())
    assert not torch.equal(head.train()(inputs), output) or "dropout" not in str(layer)
    again = zip(made(layer).parameters(), made(layer).parameters(), strict=True)
    assert all(torch.equal(one, same) for one, same in again)


def test_layers_stand_one_after_another() -> None:
    head = made({"skip": {"dropout": 0.1}}, "layer_norm", {"linear": 16}, {"activation": "relu"}, "gated", 4)
    assert head(torch.randn(2, WIDTH)).shape == (2, 4)
    assert last_width(["gated", 7, "skip"]) == 7
    assert last_width(["gated"]) is None
    assert isinstance(made(), nn.Identity)


def test_numbers_are_linear_layers_with_relu_between() -> None:
    assert [type(module) for module in made(8, 5).children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(module) for module in made(8, {"linear": 5}).children()] == [nn.Linear, nn.Linear]
    inputs, short, long = torch.randn(3, WIDTH), made(8, 5), made({"mlp": [8, 5]})
    long.load_state_dict(OrderedDict((f"0.{name}", weight) for name, weight in short.state_dict().items()))
    assert torch.equal(short(inputs), long(inputs))


def test_gates_and_skips_start_at_what_came_in() -> None:
    inputs = torch.randn(3, WIDTH)
    assert torch.equal(made("skip").eval()(inputs), inputs)
    assert torch.allclose(made("gated")(inputs), inputs / 2)


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        ("gate", "'gate' is no layer; there are identity, linear, mlp, gated, skip, widening, dropout"),
        ({"linear": 0}, "linear: {'width': 0}: width: Input should be greater than or equal to 1; it takes width"),
        ({"linear": {}}, "width: Field required"),
        ("linear", "width: Field required"),
        ({"mlp": []}, "it takes widths, activation, dropout"),
        ({"skip": {"drop": 0.1}}, "drop: Extra inputs are not permitted; it takes dropout"),
        ({"dropout": 1.0}, "less than 1"),
        ({"gated": 3}, "gated: .* it has no options"),
        ({"linear": 4, "gated": {}}, "is no layer; expected a width, a name, or one name with its options"),
        (True, "True is no layer"),
        (2.5, "2.5 is no layer"),
        (0, "greater than or equal to 1"),
    ],
)
def test_layers_that_do_not_exist(layer: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse(layer)
    with pytest.raises(ValidationError, match=fault):
        TaskConfig(kind="similarity", layers=[layer])


@pytest.mark.parametrize("kind", LAYERS.values())
def test_every_option_is_documented(kind: type) -> None:
    assert kind.__doc__
    assert [name for name, option in kind.model_fields.items() if not option.description] == []  # type: ignore[attr-defined]
