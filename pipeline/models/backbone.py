"""A backbone, the interface of its preprocessing, and the head that pools features into an embedding."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from pipeline.errors import BadSampleError, ConfigError, ModelError
from pipeline.keys import JSON
from pipeline.models.classifier import find_classifier
from pipeline.models.language import LanguageModel
from pipeline.precision import as_inputs, weights_dtype
from pipeline.tasks.base import Head
from pipeline.tasks.heads import Layer, last_width
from pipeline.tasks.layers import build_head

# B batch, T token, D channel; images of convolutional networks: H height, W width

CLASSIFIER, PROJECTION = "classifier.safetensors", "projection.safetensors"
"""Files in an exported folder, with the weights of layers that the library of the network does not know."""
EXTRA = "extra."
"""Begins the names of what a preprocessing knows of a sample that the task needs and the network does not take."""


def network_inputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a sample's or a batch's tensors that the network takes: all but the extras."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRA)}


class Preprocess(ABC):
    """A pure function of the content. Can be pickled: worker processes get a copy."""

    @property
    def pad(self) -> dict[str, float]:
        """Value that fills up an input or an extra to the longest of its batch, by name; 0 where not given."""
        return {}

    @abstractmethod
    def __call__(self, content: object) -> dict[str, Tensor]:
        """Return the inputs of one sample by name, without a batch axis, and beside them its extras (int64).

        An extra (`extra.NAME`) is stored with the state as the inputs are, and comes back to the task among the targets
        of a batch, under NAME.

        Raises:
            BadSampleError: the content cannot be used; the message says why.
        """

    def open(self, content: object) -> Any:
        """Do once what all views share (decoding); `begin` continues from it. Raises BadSampleError as `__call__`."""
        return content

    def begin(self, opened: Any) -> dict[str, Tensor]:
        """Do what must be done sample by sample, `finish` the rest; `opened` stays as it is. Raises as `__call__`."""
        return self(opened)

    def alike(self, opened: Any) -> Hashable:
        """Return a value that samples share if `begin_alike` takes them as one batch; None for a sample on its own."""
        return None

    def begin_alike(self, opened: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Return what `begin` returns for each of some samples that are alike."""
        return [self.begin(one) for one in opened]

    def excess(self, content: object, sample: dict[str, Tensor]) -> int:
        """Return how many tokens of a text its inputs, `sample`, leave out; 0 where they hold all of the content."""
        return 0

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn what `begin` returned, stacked along a new first axis, into the inputs of a batch, on its device.

        It may write into `batch`. Sample by sample or in a batch, it gives the same values.
        """
        return batch

    def view(self, number: int) -> "Preprocess":
        """Return the preprocessing of the augmented view `number`, from 0 on; `open` and `finish` are the plain one's.

        Raises ConfigError if there are no augmented views.
        """
        kind, remedy = type(self).__name__, "remove it, and encode.views"
        raise ConfigError(f"preprocess.augment is for images, and {kind} does not know it; {remedy}")

    @abstractmethod
    def recipe(self) -> Mapping[str, JSON]:
        """Return everything that decides the values of the inputs."""

    def advice(self) -> str:
        """Return which settings decide the inputs, and their values: for a network that refuses these inputs."""
        return "compare preprocess, and model.options, with what the network takes"

    def probe_contents(self) -> Sequence[object]:
        """Return fixed contents whose inputs show whether the preprocessing is still the same; none where unknown."""
        return ()

    def save(self, folder: Path) -> None:
        """Write what a network's own library reads of the preprocessing (a tokenizer) to the existing `folder`."""
        return None


class ArrayPreprocess(Preprocess):
    """Hands an array on as it is, in float32."""

    def __init__(self, input_name: str) -> None:
        self.input_name = input_name

    def __call__(self, content: object) -> dict[str, Tensor]:
        if not isinstance(content, np.ndarray):
            raise BadSampleError(f"content is {type(content).__name__}; preprocess.kind array expects an array")
        tensor = torch.from_numpy(np.array(content, np.float32))
        if not tensor.isfinite().all():
            raise BadSampleError("the array holds NaN or infinite values")
        return {self.input_name: tensor}

    def recipe(self) -> Mapping[str, JSON]:
        return {"kind": "array", "input": self.input_name}


@dataclass(frozen=True)
class Backbone:
    """A network with its head, on the CPU, and its preprocessing."""

    model: nn.Module
    """`model(**inputs)` returns logits or embeddings, depending on the head."""
    preprocess: Preprocess
    name: str
    fresh: frozenset[str] = frozenset()
    """Names in `model` of the head's parameters that were not pretrained."""
    dtype: torch.dtype = torch.float32
    """Type of the weights before a cut; `load` sets it, and `exact`."""
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of `model` that lost precision to `dtype`, as they came, by name: training starts from these."""
    is_mapped: bool = False
    """True if the pretrained weights are in their files, memory-mapped, and have the type that they have there. Where
    that is not `dtype`, they are to be converted before they compute."""

    @property
    def width(self) -> int | None:
        """Size of the embeddings; None of logits, and of the user's own network."""
        return self.model.width if isinstance(self.model, Embedder) else None

    @property
    def features(self) -> int:
        """Number of values that an embedding head pools; 0 of other heads."""
        return self.model.features if isinstance(self.model, Embedder) else 0

    @property
    def network(self) -> Any:
        """The network as its library knows it."""
        return self.model.backbone if isinstance(self.model, Embedder | LanguageModel) else self.model

    @property
    def layers_path(self) -> str | None:
        """Path in `model` of the layers that `task.layers` name; None where there are none."""
        if isinstance(self.model, Embedder):
            return "projection"
        found = find_classifier(self.model)
        return None if found is None else found[0]

    def pretrained(self, library: str) -> tuple[nn.Module, frozenset[str]]:
        """Return the network that weight files of `library` match, and the names of its pretrained tensors."""
        if isinstance(self.model, Embedder | LanguageModel) and library != "function":
            return self.network, frozenset(self.network.state_dict())
        return self.model, frozenset(self.model.state_dict()) - self.fresh

    def save(self, folder: Path) -> None:
        """Write the network to the existing `folder` in the form its library reads; `backbone.json` describes it.

        A network of Hugging Face is a directory for `from_pretrained`, with its tokenizer; any other is a state dict,
        `model.safetensors`. Layers of an embedding head have their weights in `projection.safetensors`; those of a
        classifier of Hugging Face's network in `classifier.safetensors`.
        """
        description: dict[str, Any] = {"backbone": self.name, "preprocess": self.preprocess.recipe()}
        path, classifier = find_classifier(self.network) or ("", None)
        if classifier is not None:
            description |= {"classifier": path, "layers": [*classifier.layers]}
        if hasattr(self.network, "save_pretrained"):
            state = self.network.state_dict()
            if classifier is not None:
                state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{path}.")}
                save_file(classifier.state_dict(), folder / CLASSIFIER)
            if isinstance(self.model, LanguageModel):
                self.network.config.tie_word_embeddings = self.model.is_tied
            self.network.save_pretrained(folder, state_dict=state)
            self.preprocess.save(folder)
        else:
            save_model(self.network, str(folder / "model.safetensors"))
        if isinstance(self.model, Embedder):
            head = self.model
            description |= {"pooling": head.pooling, "features": head.features, "layers": [*head.layers]}
            if projection := head.projection.state_dict():
                save_file(projection, folder / PROJECTION)
        (folder / "backbone.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class Embedder(nn.Module):
    """Features of a backbone -> one vector per sample, (B, D)."""

    def __init__(self, backbone: nn.Module, pooling: str) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.projection: nn.Module = nn.Identity()
        self.layers: Sequence[Layer] = ()
        self.features = 0

    @property
    def width(self) -> int:
        """Size D of the vectors."""
        return last_width(self.layers) or self.features

    @property
    def fresh(self) -> frozenset[str]:
        """Names of the parameters after pooling, none of which is pretrained."""
        return frozenset(f"projection.{name}" for name, _ in self.projection.named_parameters())

    def forward(self, **inputs: Tensor) -> Tensor:
        pooled_BD = self.pool(self.backbone(**inputs), inputs.get("attention_mask"))
        projected_BD: Tensor = self.projection(pooled_BD)
        return projected_BD

    def pool(self, output: Any, mask_BT: Tensor | None) -> Tensor:
        """Return one vector per sample of what the backbone returned, (B, D)."""
        if self.pooling == "pooled":
            pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
            return pooled.flatten(1)
        states: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
        if states.ndim == 4:
            states = states.flatten(2).transpose(1, 2)
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "max":
            return (states if mask_BT is None else states.masked_fill(mask_BT.unsqueeze(-1) == 0, -torch.inf)).amax(1)
        if mask_BT is None:
            return states.mean(dim=1)
        weights_BT1 = mask_BT.unsqueeze(-1).to(states.dtype)
        return (states * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1).clamp(min=1)


def embed(
    backbone: nn.Module, head: Head, pooling: str, preprocess: Preprocess, features: int | None = None
) -> Embedder:
    """Return `backbone` with an embedding head on `features` values; unless they are known, it is run on an example.

    Raises ModelError if its output cannot be pooled this way.
    """
    embedder = Embedder(backbone, pooling)
    embedder.features = features or _pooled_width(embedder, preprocess)
    embedder.projection, embedder.layers = build_head(head.layers, embedder.features), head.layers
    return embedder


def _pooled_width(embedder: Embedder, preprocess: Preprocess) -> int:
    batch = {name: tensor.unsqueeze(0) for name, tensor in preprocess(preprocess.probe_contents()[0]).items()}
    batch = as_inputs(batch, weights_dtype(embedder.parameters()))
    training = embedder.training
    try:
        with torch.no_grad():
            _, width = embedder.eval()(**batch).shape
    except Exception as error:  # of the network's own code, or of pooling what it returns
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ModelError(
            f"task.pooling is {embedder.pooling!r}; the output of {type(embedder.backbone).__name__} cannot be pooled "
            f"so, or it refuses the inputs {shapes} ({type(error).__name__}: {error}); set pooling to mean, cls, max "
            "or pooled, or preprocess to what the network takes"
        ) from error
    embedder.train(training)
    return int(width)


def first_input(model: nn.Module) -> str:
    """Return the name of the first argument of the model's forward."""
    names = list(inspect.signature(model.forward).parameters)
    if not names:
        raise ModelError(f"{type(model).__name__}.forward takes no input")
    return names[0]
