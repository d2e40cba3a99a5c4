"""Pretrained networks by name, with the head a task asks for and what makes their inputs.

Each library has its own module, imported when a backbone of it is asked for: they are slow to import.
"""

from __future__ import annotations

import logging

from pipeline.errors import ConfigError, ModelError
from pipeline.models.backbone import Backbone, Embedder
from pipeline.models.config import PRETRAINED, ModelConfig, PreprocessConfig
from pipeline.models.preprocess import EXTRA, Preprocess, network_inputs
from pipeline.tasks.base import Head

__all__ = [
    "EXTRA",
    "PRETRAINED",
    "Backbone",
    "Embedder",
    "ModelConfig",
    "Preprocess",
    "PreprocessConfig",
    "load",
    "network_inputs",
]

log = logging.getLogger(__name__)


def load(model: ModelConfig, preprocess: PreprocessConfig, head: Head) -> Backbone:
    """Return the backbone that `model` names, ending in `head`, in fp32 on the CPU, with its preprocessing.

    Raises:
        ConfigError: a setting is wrong, or names nothing that exists.
        ModelError: the network cannot be built, or its weights do not fit.
    """
    if model.weights is None:
        log.warning("model.weights is null: %s gets random weights (model.seed %d)", model.backbone, model.seed)
    backbone = _load(model, preprocess, head)
    kind = backbone.preprocess.recipe().get("kind")
    if unused := [name for name in ("rate", "seconds") if getattr(preprocess, name) is not None and kind != "audio"]:
        raise ConfigError(f"preprocess.{unused[0]} is for audio; {model.backbone} takes {kind}; remove it")
    if preprocess.augment is not None:
        backbone.preprocess.view(0)
    return backbone


def _load(model: ModelConfig, preprocess: PreprocessConfig, head: Head) -> Backbone:
    if model.library == "hf":
        from pipeline.models.hf import load_hf  # noqa: PLC0415

        return load_hf(model, preprocess, head)
    if model.library == "function":
        from pipeline.models.own import load_own  # noqa: PLC0415

        return load_own(model, preprocess, head)
    if head.kind in ("tokens", "span"):
        raise ModelError(f"{model.backbone} takes images; the task needs a network of texts: hf: or module:function")
    from pipeline.models.vision import LIBRARIES, load_vision  # noqa: PLC0415

    return load_vision(LIBRARIES[model.library](model.name, model.options), model, preprocess, head)
