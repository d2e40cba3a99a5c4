"""Layers of `task.layers` between the features of a network and its last linear layer."""

from collections.abc import Sequence

from torch import nn

from pipeline.errors import ModelError
from pipeline.models.weights import CheckpointLayout
from pipeline.tasks.heads import Layer, with_outputs
from pipeline.tasks.layers import Stack, build_head


class Classifier(Stack):
    """The layers and a new linear layer, in place of the last linear layer of a network."""

    is_single_layer = True
    """For `pipeline.split.blocks`: the layers change no cut."""

    def __init__(self, layers: Sequence[Layer], own: nn.Linear) -> None:
        stack = build_head(with_outputs(layers, own.out_features), own.in_features)
        super().__init__(*stack.children())
        self.layers = tuple(layers)


def insert_layers(model: nn.Module, layers: Sequence[Layer], layout: CheckpointLayout, name: str) -> frozenset[str]:
    """Replace the classifier of `model` in place by the layers and a linear layer, with random weights.

    Returns the names of its parameters.

    Raises:
        ModelError: the classifier, which `layout` names, is not one linear layer.
    """
    paths = sorted({tensor.rpartition(".")[0] for tensor in layout.head})
    own = [model.get_submodule(path) for path in paths]
    if len(own) != 1 or not isinstance(own[0], nn.Linear):
        found = ", ".join(f"{path} ({type(one).__name__})" for path, one in zip(paths, own, strict=True)) or "none"
        raise ModelError(
            f"task.layers is {list(layers)}, which go before a last linear layer; the classifier of {name} is {found}: "
            "remove task.layers, or choose another backbone"
        )
    classifier = Classifier(layers, own[0])
    model.set_submodule(paths[0], classifier)
    return frozenset(f"{paths[0]}.{parameter}" for parameter, _ in classifier.named_parameters())


def find_classifier(model: nn.Module) -> tuple[str, Classifier] | None:
    """Return the path of the layers that `insert_layers` put into `model`, and the layers; None if it did not."""
    return next(((path, part) for path, part in model.named_modules() if isinstance(part, Classifier)), None)
