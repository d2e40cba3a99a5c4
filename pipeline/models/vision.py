"""Image backbones of torchvision and timm."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torchvision
from torch import Tensor, nn

from pipeline.errors import AbsentError, ConfigError, ModelError
from pipeline.models.backbone import Backbone, embed, first_input
from pipeline.models.classifier import insert_layers
from pipeline.models.config import ModelConfig, PreprocessConfig
from pipeline.models.images import ImageDefaults, ImagePreprocess
from pipeline.models.weights import CheckpointLayout, fit_weights, parameters_on_meta, read_weights, seeded
from pipeline.tasks.base import Head


class Torchvision:
    """Classification networks of torchvision; `options` are further arguments of the constructor of `name`."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, dict(options)
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ConfigError(f"model.backbone is 'torchvision:{name}'; torchvision has {', '.join(known)}")

    def build(self, classes: int) -> nn.Module:
        """Return the network with random weights and a classifier of `classes` outputs; with 0, it returns features."""
        model: nn.Module = torchvision.models.get_model(self.name, weights=None, **self.arguments(classes))
        if classes == 0:
            for path in self.classifiers():
                model.set_submodule(path, nn.Identity())
        return model

    def arguments(self, classes: int) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        # What torchvision sets itself when it loads these networks' weights.
        old = {"init_weights": True, "transform_input": True} if self.name in ("googlenet", "inception_v3") else {}
        return {"num_classes": classes or 1} | old | self.options

    def classifiers(self) -> list[str]:
        """Return the paths of the layers whose size follows the classes."""
        return sorted({name.rpartition(".")[0] for name in CheckpointLayout.of(self.build).head})

    def pretrained(self) -> Mapping[str, Tensor]:
        """Return the library's own weights."""
        weights: Mapping[str, Tensor] = self._weights().get_state_dict(progress=False, check_hash=True)
        return weights

    def defaults(self, model: nn.Module) -> ImageDefaults:
        """Return the image preprocessing of the network."""
        preset = self._weights().transforms()
        return ImageDefaults(preset.crop_size[0], preset.interpolation.value, _triple(preset.mean), _triple(preset.std))

    def _weights(self) -> Any:
        return torchvision.models.get_model_weights(self.name).DEFAULT


class Timm:
    """Networks of timm, an optional dependency; methods as in `Torchvision`."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, dict(options)
        try:
            import timm  # noqa: PLC0415  (optional, and slow to import)
        except ImportError as error:
            raise ConfigError(f"model.backbone is 'timm:{name}'; pip install layer-recycling[timm]") from error
        self.timm = timm
        if not timm.is_model(name):
            near = ", ".join(get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
            raise ConfigError(f"model.backbone is 'timm:{name}'; timm has no such network (near: {near})")

    def build(self, classes: int) -> nn.Module:
        model: nn.Module = self.timm.create_model(self.name, num_classes=classes, **self.options)
        return model

    def pretrained(self) -> Mapping[str, Tensor]:
        model: nn.Module = self.timm.create_model(self.name, pretrained=True, **self.options)
        return model.state_dict()

    def defaults(self, model: nn.Module) -> ImageDefaults:
        data = self.timm.data.config.resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        return ImageDefaults(data["input_size"][-1], data["interpolation"], _triple(data["mean"]), _triple(data["std"]))


LIBRARIES: Mapping[str, type[Torchvision | Timm]] = {"torchvision": Torchvision, "timm": Timm}


def load_vision(config: ModelConfig, preprocess: PreprocessConfig, head: Head, features: int | None = None) -> Backbone:
    """Build the network with the head, and fill in its weights; `features` and errors as `load` has them."""
    if head.kind in ("tokens", "span"):
        raise ModelError(f"{config.backbone} takes images; the task needs a network of texts: hf: or module:function")
    library = LIBRARIES[config.library](config.name, config.options)
    if preprocess.kind not in (None, "image"):
        raise ConfigError(f"preprocess.kind is {preprocess.kind!r}; {config.backbone} takes images; remove it")
    classes = head.size or 0 if head.kind == "classes" else 0
    try:
        with seeded(config.seed), parameters_on_meta(features is not None):
            model = library.build(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{config.backbone} cannot be built with model.options {config.options}: {error}") from error
    fresh: frozenset[str] = frozenset()
    if features is None and config.weights is not None:
        state = read_weights(config) if config.has_file else _pretrained(library, config)
        fresh = fit_weights(model, state, CheckpointLayout.of(library.build), f"model.weights {config.weights}")
    preprocessor = ImagePreprocess(preprocess, library.defaults(model), first_input(model))
    if head.kind == "classes":
        if head.layers:
            with seeded(config.seed):
                fresh = insert_layers(model, head.layers, CheckpointLayout.of(library.build), config.backbone)
        return Backbone(model, preprocessor, config.backbone, fresh)
    with seeded(config.seed):
        embedder = embed(model, head, head.pooling or "pooled", preprocessor, features)
    return Backbone(embedder, preprocessor, config.backbone, embedder.fresh)


def _pretrained(library: Torchvision | Timm, config: ModelConfig) -> Mapping[str, Tensor]:
    try:
        return library.pretrained()
    except Exception as error:  # a download fails in as many ways as there are libraries
        raise AbsentError(
            f"the pretrained weights of {config.backbone} cannot be had ({type(error).__name__}: {error}); "
            "connect to the network, or set model.weights to a file, or to null for random weights"
        ) from error


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
