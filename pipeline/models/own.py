"""Backbones of the user's own: a function that makes one for a head."""

from dataclasses import replace

from torch import nn

from pipeline.errors import ConfigError, ModelError
from pipeline.files import load_function
from pipeline.models.audio import make_audio_preprocess
from pipeline.models.backbone import ArrayPreprocess, Backbone, Preprocess, first_input
from pipeline.models.config import ModelConfig, PreprocessConfig
from pipeline.models.images import ImageDefaults, ImagePreprocess
from pipeline.models.tokenization import make_text_preprocess
from pipeline.models.weights import CheckpointLayout, fit_weights, parameters_on_meta, read_weights, seeded
from pipeline.tasks.base import Head


def load_own(config: ModelConfig, preprocess: PreprocessConfig, head: Head, features: int | None = None) -> Backbone:
    """Call the user's function with the head, in which its network ends already; `features` and errors are `load`'s."""
    if head.layers and head.kind != "embedding":
        raise ConfigError(
            f"task.layers is {list(head.layers)}; {config.backbone} makes its own classifier: build the layers there, "
            "and remove task.layers"
        )
    function = load_function(config.backbone, "model.backbone", "head: Head")
    with seeded(config.seed), parameters_on_meta(features is not None):
        built = function(head)
    model = _network(built)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{config.backbone} returned {type(built).__name__}; expected an nn.Module or a Backbone")
    fresh: frozenset[str] = frozenset()
    if features is None and config.has_file:
        state = read_weights(config)
        layout = CheckpointLayout({name: tensor.shape for name, tensor in model.state_dict().items()}, frozenset())
        if head.size is not None:
            layout = CheckpointLayout.of(lambda classes: _network(function(replace(head, size=classes))))
        fresh = fit_weights(model, state, layout, f"model.weights {config.weights}")
    if isinstance(built, Backbone):
        return replace(built, fresh=built.fresh | fresh)
    return Backbone(model, _make_preprocess(model, preprocess, config, head), config.backbone, fresh)


def _network(built: nn.Module | Backbone) -> nn.Module:
    return built.model if isinstance(built, Backbone) else built


def _make_preprocess(model: nn.Module, preprocess: PreprocessConfig, config: ModelConfig, head: Head) -> Preprocess:
    if preprocess.kind == "image":
        return ImagePreprocess(preprocess, ImageDefaults(), first_input(model))
    if preprocess.kind == "array":
        return ArrayPreprocess(first_input(model))
    if preprocess.kind == "audio":
        return make_audio_preprocess(preprocess, model)
    if preprocess.kind == "text":
        return make_text_preprocess(preprocess, model, head)
    raise ConfigError(
        f"preprocess.kind is not set; {config.backbone} returned a network alone: set image, audio, text or array, "
        "or return a Backbone with its own Preprocess"
    )
