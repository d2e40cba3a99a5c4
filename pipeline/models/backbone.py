"""A backbone with its preprocessing, and the head that pools features into an embedding."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models.preprocess import Preprocess
from pipeline.tasks.base import Head
from pipeline.tasks.heads import Layer, build_head, last_width

# B batch, T token, D channel; images of convolutional networks: H height, W width


@dataclass(frozen=True)
class Backbone:
    """A network with its head, in fp32 on the CPU, and its preprocessing."""

    model: nn.Module
    """`model(**inputs)` returns logits or embeddings, depending on the head."""
    preprocess: Preprocess
    name: str
    fresh: frozenset[str] = frozenset()
    """Names in `model` of the head's parameters that were not pretrained."""

    @property
    def width(self) -> int | None:
        """Size of the embeddings; None of logits, and of the user's own network."""
        return self.model.width if isinstance(self.model, Embedder) else None

    def pretrained(self, library: str) -> tuple[nn.Module, frozenset[str]]:
        """Return the network that weight files of `library` match, and the names of its pretrained tensors."""
        embedded = isinstance(self.model, Embedder) and library != "function"
        network: Any = self.model.backbone if embedded else self.model
        return network, frozenset(network.state_dict()) - (frozenset() if embedded else self.fresh)

    def save(self, folder: Path) -> None:
        """Write the network to the existing `folder` in the form its library reads; `backbone.json` describes it.

        A network of Hugging Face is a directory for `from_pretrained`, with its tokenizer; any other is a state dict,
        `model.safetensors`. Layers of an embedding head have their weights in `projection.safetensors`.
        """
        network: Any = self.model.backbone if isinstance(self.model, Embedder) else self.model
        description: dict[str, Any] = {"backbone": self.name, "preprocess": self.preprocess.recipe()}
        if hasattr(network, "save_pretrained"):
            network.save_pretrained(folder)
            self.preprocess.save(folder)
        else:
            save_model(network, str(folder / "model.safetensors"))
        if isinstance(self.model, Embedder):
            embedder = self.model
            description |= {"pooling": embedder.pooling, "features": embedder.features, "layers": [*embedder.layers]}
            if projection := embedder.projection.state_dict():
                save_file(projection, folder / "projection.safetensors")
        (folder / "backbone.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class Embedder(nn.Module):
    """Features of a backbone -> one vector per sample, (B, D)."""

    def __init__(self, backbone: nn.Module, pooling: str) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.projection: nn.Module = nn.Identity()
        self.layers: Sequence[Layer] = ()
        self.features = 0

    def project(self, layers: Sequence[Layer], features: int) -> None:
        """Put `layers` after pooling, which gives (B, features)."""
        self.projection, self.layers, self.features = build_head(layers, features), layers, features

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


def embed(backbone: nn.Module, head: Head, pooling: str, preprocess: Preprocess) -> Embedder:
    """Return `backbone` with an embedding head; its width is found by running it once on an example.

    Raises ModelError if its output cannot be pooled this way.
    """
    embedder = Embedder(backbone, pooling)
    batch = {name: tensor.unsqueeze(0) for name, tensor in preprocess(preprocess.probe_contents()[0]).items()}
    training = backbone.training
    try:
        with torch.no_grad():
            _, features = embedder.eval()(**batch).shape
    except Exception as error:  # of the network's own code, or of pooling what it returns
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ModelError(
            f"task.pooling is {pooling!r}; the output of {type(backbone).__name__} cannot be pooled so, or it refuses "
            f"the inputs {shapes} ({type(error).__name__}: {error}); set pooling to mean, cls, max or pooled, or "
            "preprocess to what the network takes"
        ) from error
    embedder.project(head.layers, features)
    return embedder.train(training)


def first_input(model: nn.Module) -> str:
    """Return the name of the first argument of the model's forward."""
    names = list(inspect.signature(model.forward).parameters)
    if not names:
        raise ModelError(f"{type(model).__name__}.forward takes no input")
    return names[0]
