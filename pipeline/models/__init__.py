"""Backbones: pretrained networks by name, with the head of a task and preprocessing; libraries load on demand."""

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ModelError
from pipeline.models.config import PRETRAINED, ModelConfig, PreprocessConfig
from pipeline.tasks.base import Head

if TYPE_CHECKING:
    from pipeline.models.backbone import EXTRA, Backbone, Preprocess, network_inputs
    from pipeline.models.weights import fill

__all__ = [
    "EXTRA",
    "PRETRAINED",
    "Backbone",
    "ModelConfig",
    "Preprocess",
    "PreprocessConfig",
    "as_described",
    "describe",
    "fill",
    "load",
    "loading_code",
    "network_inputs",
]

log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: settings are read without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'weights' if name == 'fill' else 'backbone'}"), name)


def load(
    model: ModelConfig, preprocess: PreprocessConfig, head: Head, features: int | None = None, *, mapped: bool = False
) -> "Backbone":
    """Return the backbone that `model` names, ending in `head`, on the CPU, with its preprocessing.

    With `features`, the size of what an embedding head pools (0 for another head), no weights are read: parameters are
    on the meta device, but for the layers that `task.layers` name. With `mapped`, the weights stay in their files.

    Raises:
        NotMappableError: they are to be `mapped`, and cannot be.
        AbsentError: the weights or the configuration are not on this machine and cannot be downloaded.
        ConfigError: a setting is wrong, or names nothing that exists.
        ModelError: the network cannot be built, or its weights do not fit.
    """
    import torch  # noqa: PLC0415

    from pipeline.models.weights import convert, wider_than  # noqa: PLC0415
    from pipeline.precision import weights_dtype  # noqa: PLC0415

    if model.weights is None and features is None:
        log.warning("model.weights is null: %s gets random weights (model.seed %d)", model.backbone, model.seed)
    if mapped:
        from pipeline.models.hf import load_mapped as build  # noqa: PLC0415
    elif model.library == "hf":
        from pipeline.models.hf import load_hf as build  # noqa: PLC0415
    elif model.library == "function":
        from pipeline.models.own import load_own as build  # noqa: PLC0415
    else:
        from pipeline.models.vision import load_vision as build  # noqa: PLC0415
    backbone = build(model, preprocess, head, features)
    kind = backbone.preprocess.recipe().get("kind")
    if unused := [name for name in ("rate", "seconds") if getattr(preprocess, name) is not None and kind != "audio"]:
        raise ConfigError(f"preprocess.{unused[0]} is for audio; {model.backbone} takes {kind}; remove it")
    if preprocess.augment is not None:
        backbone.preprocess.view(0)
    if model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.dtype)
        if mapped:
            return replace(backbone, dtype=dtype, exact=wider_than(backbone.model, dtype))
        return replace(backbone, dtype=dtype, exact=convert(backbone.model, dtype))
    given = [item for name, item in backbone.model.named_parameters() if name not in backbone.fresh]
    dtype = weights_dtype(given or backbone.model.parameters())
    # The network may be of several types; only new layers follow it.
    return replace(backbone, dtype=dtype, exact=convert(backbone.model, dtype, backbone.fresh))


def describe(model: ModelConfig, backbone: "Backbone", folder: Path) -> None:
    """Write the files to the existing `folder` from which `as_described` builds the network."""
    if backbone.preprocess.recipe().get("kind") != "image":
        backbone.preprocess.save(folder)
    if model.library == "hf":
        from pipeline.models.hf import describe_hf  # noqa: PLC0415

        describe_hf(model, backbone, folder)


def loading_code(model: ModelConfig, head: Head, backbone: "Backbone") -> str:
    """Return lines of Python that load what `backbone.save` wrote, without this package."""
    from pipeline.models.loading import loading_code as code  # noqa: PLC0415

    return code(model, head, backbone)


def as_described(
    model: ModelConfig, preprocess: PreprocessConfig, folder: Path
) -> tuple[ModelConfig, PreprocessConfig]:
    """Return the settings for `load` to build the network of `model` from the files of `describe` in `folder`.

    Raises ModelError if it needs code of its repository.
    """
    if model.trust_remote_code:
        raise ModelError(f"{model.backbone} is made by code of its own repository, which is not carried; fetch that")
    if model.library == "hf":
        model = model.model_copy(update={"backbone": f"hf:{folder}", "revision": None})
    if preprocess.tokenizer is not None:
        preprocess = preprocess.model_copy(update={"tokenizer": str(folder)})
    return model, preprocess
