"""The modules of the layers that `heads` describes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.tasks import heads

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}

# B batch, D channel


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


def _mlp(config: heads.Mlp, width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(width, config.widths[0])]
    for ins, outs in zip(config.widths, config.widths[1:], strict=False):
        layers.append(_ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
        layers.append(nn.Linear(ins, outs))
    return Stack(*layers)


def _widening(config: heads.Widening, width: int) -> nn.Module:
    middle = max(1, round(width * config.factor))
    return Stack(nn.Linear(width, middle), _ACTIVATIONS[config.activation](), nn.Linear(middle, width))


_BUILD: Mapping[type[heads.LayerConfig], Callable[[Any, int], nn.Module]] = {
    heads.Identity: lambda config, width: nn.Identity(),
    heads.Linear: lambda config, width: nn.Linear(width, config.width),
    heads.Mlp: _mlp,
    heads.Gated: lambda config, width: Gate(width),
    heads.Skip: lambda config, width: Residual(width, config.dropout),
    heads.Widening: _widening,
    heads.Dropout: lambda config, width: nn.Dropout(config.share),
    heads.LayerNorm: lambda config, width: nn.LayerNorm(width),
    heads.ActivationLayer: lambda config, width: _ACTIVATIONS[config.function](),
}
"""Options of a kind of layer -> its module for inputs (B, width), with random weights of torch's generator."""


def build_head(layers: Sequence[heads.Layer], width: int) -> nn.Module:
    """Return the layers for inputs (B, width) in sequence, or the identity; raises ValueError as `parse` does."""
    modules: list[nn.Module] = []
    for number, layer in enumerate(layers):
        if number and isinstance(layer, int) and isinstance(layers[number - 1], int):
            modules.append(nn.ReLU())
        config = heads.parse(layer)
        modules.append(_BUILD[type(config)](config, width))
        width = config.width_after(width)
    return Stack(*modules) if modules else nn.Identity()
