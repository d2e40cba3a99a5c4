"""The layers of a head, listed in params.yaml by name and options.

A layer is written `name`, `{name: value}` (the value of its first option) or `{name: {option: value}}`. A bare number
is a linear layer of that width, with a ReLU between two numbers in a row: `[512, 256]` is a small MLP.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pipeline.config import Section

Layer = int | str | dict[str, Any]
"""A layer as it is written in params.yaml."""

Width = Annotated[int, Field(ge=1)]
Activation = Literal["relu", "gelu", "silu", "tanh"]

# B batch, D channel


class LayerConfig(Section):
    """Options of one kind of layer."""

    def width_after(self, width: int) -> int:
        """Return the width of what the layer gives for inputs (B, width)."""
        return width


class Identity(LayerConfig):
    """No layer: the pooled vector is the embedding."""


class Linear(LayerConfig):
    """A linear layer with bias."""

    width: Width
    """Width of the output."""

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

    def width_after(self, width: int) -> int:
        return self.widths[-1]


class Gated(LayerConfig):
    """A learnt gate between 0 and 1 per feature: as few parameters as features, for small data sets."""


class Skip(LayerConfig):
    """The input plus a linear layer of it that starts at zero: training starts at the pretrained embedding."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the linear layer; the sum keeps the whole input."""


class Widening(LayerConfig):
    """A linear layer up, an activation, and a linear layer down to the width of the input."""

    factor: float = Field(default=4.0, gt=0)
    """Width of the middle, relative to the input."""
    activation: Activation = "relu"
    """Function in the middle."""


class Dropout(LayerConfig):
    """Dropout of features in training."""

    share: float = Field(ge=0, lt=1)
    """Dropout probability."""


class LayerNorm(LayerConfig):
    """Layer normalisation over the features, with a learnt scale and shift."""


class ActivationLayer(LayerConfig):
    """A function of each feature."""

    function: Activation
    """The function."""


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
