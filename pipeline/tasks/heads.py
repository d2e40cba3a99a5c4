"""The layers of a head, listed in params.yaml by name and options.

A layer is written `name`, `{name: value}` (the value of its first option) or `{name: {option: value}}`. A bare number
is a linear layer of that width, with a ReLU between two numbers in a row: `[512, 256]` is a small MLP.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from pipeline.config import Section

Layer = int | str | dict[str, Any]
"""A layer as it is written in params.yaml."""

Width = Annotated[int, Field(ge=1)]
Activation = Literal["relu", "gelu", "silu", "tanh"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}

# B batch, D channel


class LayerConfig(Section):
    """Options of one kind of layer."""

    @abstractmethod
    def build(self, width: int) -> nn.Module:
        """Return the layer for inputs (B, width), with random weights of torch's generator."""

    def width_after(self, width: int) -> int:
        """Return the width of what the layer gives for inputs (B, width)."""
        return width


class Identity(LayerConfig):
    """No layer: the pooled vector is the embedding."""

    def build(self, width: int) -> nn.Module:
        return nn.Identity()


class Linear(LayerConfig):
    """A linear layer with bias."""

    width: Width
    """Width of the output."""

    def build(self, width: int) -> nn.Module:
        return nn.Linear(width, self.width)

    def width_after(self, width: int) -> int:
        return self.width


class Mlp(LayerConfig):
    """Linear layers with an activation, and optionally dropout, between them."""

    widths: Annotated[tuple[Width, ...], Field(strict=False, min_length=1)]
    """Output width of each layer."""
    activation: Activation = "relu"
    """Function between the layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability after each activation."""

    def build(self, width: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(width, self.widths[0])]
        for ins, outs in zip(self.widths, self.widths[1:], strict=False):
            layers.append(_ACTIVATIONS[self.activation]())
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
            layers.append(nn.Linear(ins, outs))
        return Stack(*layers)

    def width_after(self, width: int) -> int:
        return self.widths[-1]


class Gated(LayerConfig):
    """A learnt gate between 0 and 1 per feature: as few parameters as features, for small data sets."""

    def build(self, width: int) -> nn.Module:
        return Gate(width)


class Skip(LayerConfig):
    """The input plus a linear layer of it that starts at zero: training starts at the pretrained embedding."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the linear layer; the sum keeps the whole input."""

    def build(self, width: int) -> nn.Module:
        return Residual(width, self.dropout)


class Widening(LayerConfig):
    """A linear layer up, an activation, and a linear layer down to the width of the input."""

    factor: float = Field(default=4.0, gt=0)
    """Width of the middle, relative to the input."""
    activation: Activation = "relu"
    """Function in the middle."""

    def build(self, width: int) -> nn.Module:
        middle = max(1, round(width * self.factor))
        return Stack(nn.Linear(width, middle), _ACTIVATIONS[self.activation](), nn.Linear(middle, width))


class Dropout(LayerConfig):
    """Dropout of features in training."""

    share: float = Field(ge=0, lt=1)
    """Dropout probability."""

    def build(self, width: int) -> nn.Module:
        return nn.Dropout(self.share)


class LayerNorm(LayerConfig):
    """Layer normalisation over the features, with a learnt scale and shift."""

    def build(self, width: int) -> nn.Module:
        return nn.LayerNorm(width)


class ActivationLayer(LayerConfig):
    """A function of each feature."""

    function: Activation
    """The function."""

    def build(self, width: int) -> nn.Module:
        return _ACTIVATIONS[self.function]()


class Stack(nn.Sequential):
    """Layers in sequence. The type distinguishes them from a backbone's blocks, which a cut counts."""


class Gate(nn.Module):
    """Multiplies each feature by the sigmoid of a parameter of its own; all gates start half open, (B, D) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(width))

    def forward(self, inputs_BD: Tensor) -> Tensor:
        return inputs_BD * torch.sigmoid(self.gates)


class Residual(nn.Module):
    """Adds to its input a linear layer of it, (B, D) -> (B, D)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs_BD: Tensor) -> Tensor:
        added_BD: Tensor = self.linear(self.dropout(inputs_BD))
        return inputs_BD + added_BD


LAYERS: dict[str, type[LayerConfig]] = {
    "identity": Identity,
    "linear": Linear,
    "mlp": Mlp,
    "gated": Gated,
    "skip": Skip,
    "widening": Widening,
    "dropout": Dropout,
    "layer_norm": LayerNorm,
    "activation": ActivationLayer,
}


def build_head(layers: Sequence[Layer], width: int) -> nn.Module:
    """Return the layers for inputs (B, width) in sequence, or the identity; raises ValueError as `parse` does."""
    modules: list[nn.Module] = []
    for number, layer in enumerate(layers):
        if number and isinstance(layer, int) and isinstance(layers[number - 1], int):
            modules.append(nn.ReLU())
        config = parse(layer)
        modules.append(config.build(width))
        width = config.width_after(width)
    return Stack(*modules) if modules else nn.Identity()


def with_outputs(layers: Sequence[Layer], outputs: int) -> list[Layer]:
    """Return the layers and a linear layer for so many outputs, which continues an mlp at their end."""
    last = parse(layers[-1])
    if isinstance(last, Mlp):
        return [*layers[:-1], {"mlp": {**last.model_dump(), "widths": (*last.widths, outputs)}}]
    return [*layers, outputs]


def last_width(layers: Sequence[Layer]) -> int | None:
    """Return the output width of the layers; None if it is the input width."""
    width = 0
    for layer in layers:
        width = parse(layer).width_after(width)
    return width or None


def parse(layer: object) -> LayerConfig:
    """Return the options of a layer as written in params.yaml; raises ValueError if it or an option does not exist."""
    if isinstance(layer, int) and not isinstance(layer, bool):
        layer = {"linear": layer}
    if isinstance(layer, str):
        layer = {layer: {}}
    if not isinstance(layer, Mapping) or len(layer) != 1:
        raise ValueError(f"{layer!r} is no layer; expected a width, a name, or one name with its options")
    ((name, options),) = layer.items()
    if name not in LAYERS:
        raise ValueError(f"{name!r} is no layer; there are {', '.join(LAYERS)}")
    kind = LAYERS[name]
    known = list(kind.model_fields)
    if not isinstance(options, Mapping):
        options = {known[0]: options} if known else {"value": options}
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        takes = f"takes {', '.join(known)}" if known else "has no options"
        raise ValueError(f"{name}: {dict(options)}: {'; '.join(faults)}; it {takes}") from error
