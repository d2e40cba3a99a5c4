"""Backbones of Hugging Face, from a directory or the hub."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, PreTrainedConfig
from transformers.utils import logging as transformers_log

from pipeline.errors import AbsentError, ConfigError, ModelError, NotMappableError, RecyclingError, first_few
from pipeline.files import check_sha256
from pipeline.models.audio import make_audio_preprocess
from pipeline.models.backbone import Backbone, Preprocess, embed
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.classifier import insert_layers
from pipeline.models.config import ModelConfig, PreprocessConfig
from pipeline.models.hf_heads import arrange_head, auto_class, classifier_layout, label_settings
from pipeline.models.hf_images import image_defaults, load_image_processor
from pipeline.models.images import ImagePreprocess
from pipeline.models.language import as_language_model
from pipeline.models.origin import Origin
from pipeline.models.texts import first_line
from pipeline.models.tokenization import load_tokenizer, make_text_preprocess
from pipeline.models.weights import fill, parameters_on_meta, read_weights, seeded
from pipeline.precision import weights_dtype
from pipeline.tasks.base import Head

log = logging.getLogger("recycle")

KINDS = {"pixel_values": "image", "input_values": "audio", "input_features": "audio"}
"""Kind of content by the name of the network's main input; texts have several inputs."""


def checkpoint_of(config: ModelConfig) -> Checkpoint:
    """Return what the files hold from which the weights of a network are read; raises as `Checkpoint.read`."""
    if config.library != "hf":
        raise NotMappableError(
            f"{config.backbone} is loaded into memory; only weights of hf: networks can stay in files"
        )
    origin = Origin(config)
    return Checkpoint.read(config, origin.source, origin.arguments)


def load_hf(config: ModelConfig, preprocess: PreprocessConfig, head: Head, features: int | None = None) -> Backbone:
    """Build the network with the head, and fill in its weights; `features` and errors as `load` has them."""
    return _load(config, preprocess, head, features, None)


def load_mapped(config: ModelConfig, preprocess: PreprocessConfig, head: Head, features: int | None = None) -> Backbone:
    """Build the network with weights that stay in their files, in the type that they have there; else as `load_hf`."""
    return _load(config, preprocess, head, features, checkpoint_of(config))


def _load(
    config: ModelConfig, preprocess: PreprocessConfig, head: Head, features: int | None, checkpoint: Checkpoint | None
) -> Backbone:
    origin = Origin(config)
    with _quiet():
        settings = _read_config(origin, config, head)
        auto = auto_class(settings, config, head)
        with torch.device("meta"):
            blueprint = _build(auto, copy.deepcopy(settings), config, {})  # sets the type of the weights in it
        pooling, extra = _pooling(head, blueprint)
        if checkpoint is not None:
            checkpoint.check(blueprint, config, None if config.has_file else _stated_dtype(settings))
        preprocessor = _make_preprocess(origin, preprocess, settings, blueprint, head)
        build = partial(_build, auto, config=config, extra=extra)
        with seeded(config.seed), parameters_on_meta(features is not None):
            if config.weights is None or features is not None:
                model, fresh = build(settings), frozenset[str]()
            elif config.has_file:
                state = read_weights(config)
                settings.dtype = weights_dtype(state.values())
                given = {"config": settings, "state_dict": state, **extra}
                model, fresh = _fill(type(blueprint), None, config, given)
            else:
                model, fresh = _fill_from_checkpoint(auto, origin, settings, config, head, build, extra)
        with seeded(config.seed):
            if head.kind == "embedding":
                model = embed(model, head, pooling, preprocessor, features)
                fresh = model.fresh
            elif head.kind == "language":
                model = as_language_model(model, blueprint, head)
                fresh = frozenset(f"backbone.{name}" for name in fresh)
            elif head.layers:
                fresh = insert_layers(model, head.layers, classifier_layout(model, build), config.backbone)
        return Backbone(model, preprocessor, config.backbone, fresh, is_mapped=checkpoint is not None)


def describe_hf(config: ModelConfig, backbone: Backbone, folder: Path) -> None:
    """Write the configurations of the network and of its image processor, if any, to the existing `folder`."""
    settings = copy.deepcopy(backbone.network.config)
    count, settings.id2label = settings.num_labels, None  # names of labels may change, and belong to the sample table
    settings.num_labels = count
    settings.save_pretrained(folder)
    origin = Origin(config)
    if isinstance(backbone.preprocess, ImagePreprocess) and (
        processor := load_image_processor(origin.source, origin.arguments)
    ):
        processor.save_pretrained(folder)


def _read_config(origin: Origin, config: ModelConfig, head: Head) -> Any:
    options = {**label_settings(head), **config.options}
    try:
        read: Any = AutoConfig.from_pretrained
        settings, unused = read(origin.source, return_unused_kwargs=True, **origin.arguments, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot(f"model.backbone {config.backbone!r} cannot be loaded", error, origin) from error
    if unknown := sorted(set(unused) & set(config.options)):
        raise ConfigError(f"model.options has {', '.join(unknown)}, which {type(settings).__name__} does not have")
    if getattr(settings, "use_cache", False):
        settings.use_cache = False  # keys and values for the next token: of no use here, and would cross the cut
    return settings


def _stated_dtype(settings: Any) -> torch.dtype | None:
    """Return the type of the weights that a configuration states; None where it states none."""
    stated = getattr(settings, "dtype", None)
    return getattr(torch, stated) if isinstance(stated, str) else stated


def _build(auto: Any, settings: Any, config: ModelConfig, extra: Mapping[str, Any]) -> nn.Module:
    try:
        trust = config.trust_remote_code
        model: nn.Module = auto.from_config(settings, trust_remote_code=trust, dtype=torch.float32, **extra)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"model.backbone {config.backbone!r} cannot be built: {first_line(error)}") from error
    return model


def _pooling(head: Head, blueprint: Any) -> tuple[str, dict[str, Any]]:
    """Return how to pool, and the argument that removes an unused pooler, whose weights would get no gradient."""
    is_pooled = blueprint.main_input_name == "pixel_values" and getattr(blueprint, "pooler", None) is not None
    pooling = head.pooling or ("pooled" if is_pooled else "mean")
    accepts = "add_pooling_layer" in inspect.signature(type(blueprint).__init__).parameters
    return pooling, {"add_pooling_layer": False} if accepts and head.kind == "embedding" and pooling != "pooled" else {}


def _fill_from_checkpoint(
    auto: Any,
    origin: Origin,
    settings: Any,
    config: ModelConfig,
    head: Head,
    build: Callable[[Any], nn.Module],
    extra: Mapping[str, Any],
) -> tuple[nn.Module, frozenset[str]]:
    """Return the network with the weights of its directory or repository, and the names of its new tensors."""
    _check_digest(origin, config)
    model, fresh = _fill(auto, origin, config, {"config": settings, **origin.arguments, **extra})
    if "gguf_file" in origin.arguments:
        model = _plain(model, build)
    stored = PreTrainedConfig.get_config_dict(origin.source, **origin.arguments)[0].get("id2label") or {}
    labels = [str(stored[number]) for number in sorted(stored, key=int)]
    fresh, remark = arrange_head(model, labels, head, build, fresh)
    if remark is not None:
        log.warning("%s: %s", config.backbone, remark)
    return model, fresh


def _plain(model: Any, build: Callable[[Any], nn.Module]) -> Any:
    """Return a network with the weights of `model`, of a GGUF file, that can be saved: the library refuses `model`."""
    settings = copy.deepcopy(model.config)
    for name in ("quantization_config", "_is_quantized"):
        vars(settings).pop(name, None)
    with parameters_on_meta():
        plain = build(settings)
    fill(plain, model.state_dict())
    return plain.train()


def _fill(
    auto: Any, origin: Origin | None, config: ModelConfig, arguments: Mapping[str, Any]
) -> tuple[nn.Module, frozenset[str]]:
    """Return the network with its weights, and the names of those that are not in the checkpoint."""
    options = {"dtype": "auto", "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = auto.from_pretrained(origin and origin.source, **options, **arguments)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot(f"weights of {config.backbone!r} cannot be loaded", error, origin) from error
    fresh = _check_fit(model, info, config)
    return model.train(), fresh  # in training mode, as other libraries give their networks


def _cannot(what: str, error: Exception, origin: Origin | None) -> RecyclingError:
    """Return the error of a failed load: `AbsentError` if a download failed, which may succeed on another machine."""
    is_download = isinstance(error, OSError) and origin is not None and origin.folder is None
    return (AbsentError if is_download else ModelError)(f"{what}: {first_line(error)}")


def _check_digest(origin: Origin, config: ModelConfig) -> None:
    if config.sha256 is None:
        return
    if origin.folder is None:
        raise ConfigError("model.sha256 is for files; fix what a hub repository holds by model.revision")
    kinds = [origin.arguments["gguf_file"]] if "gguf_file" in origin.arguments else ["*.safetensors", "*.bin"]
    files = next(filter(None, (sorted(origin.folder.glob(kind)) for kind in kinds)), [])
    if len(files) != 1:
        raise ConfigError(f"model.sha256 is set, and {origin.folder} has {len(files)} files of weights; expected one")
    check_sha256(files[0], config.sha256, "model")


def _check_fit(model: Any, info: Mapping[str, Any], config: ModelConfig) -> frozenset[str]:
    """Check that only tensors of heads and poolers are missing or unused; return the names of the missing ones."""
    base = model.base_model
    prefix = f"{model.base_model_prefix}."
    trunk = {name for name, _ in base.named_children()} | {model.base_model_prefix}

    def is_head(name: str) -> bool:
        outside = base is not model and not name.startswith(prefix)
        return outside or "pooler" in name.split(".")

    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    unexpected = [name for name in info["unexpected_keys"] if name.partition(".")[0] in trunk]
    faults = {
        "missing": [name for name in info["missing_keys"] if not is_head(name)],
        "of another shape": [name for name in mismatched if not is_head(name)],
        "unexpected": [name for name in unexpected if "pooler" not in name.split(".")],
    }
    if any(faults.values()):
        found = [(kind, sorted(names)) for kind, names in faults.items() if names]
        remark = "; ".join(f"{len(names)} {kind}: {first_few(names)}" for kind, names in found)
        raise ModelError(f"model.weights {config.weights} does not fit {config.backbone}: {remark}")
    if fresh := sorted({*info["missing_keys"], *mismatched}):
        log.info("%s: the head is new (%s)", config.backbone, first_few(fresh))
    return frozenset(fresh)


def _make_preprocess(origin: Origin, config: PreprocessConfig, settings: Any, blueprint: Any, head: Head) -> Preprocess:
    kind = KINDS.get(blueprint.main_input_name, "text")
    if config.kind not in (None, kind):
        raise ConfigError(f"preprocess.kind is {config.kind!r}; the backbone's is {kind!r}; remove it")
    if kind == "audio":
        load: Any = AutoFeatureExtractor.from_pretrained
        try:
            extractor = load(origin.source, **origin.arguments)
        except (OSError, ValueError, ImportError) as error:
            fault = f"no feature extractor can be loaded from {origin.source} ({first_line(error)})"
            raise ConfigError(fault) from error
        return make_audio_preprocess(config, blueprint, extractor)
    if kind == "image":
        defaults = image_defaults(origin.source, settings, origin.arguments)
        return ImagePreprocess(config, defaults, blueprint.main_input_name)
    own = {} if config.tokenizer else origin.arguments
    tokenizer = load_tokenizer(config.tokenizer or origin.source, **own)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # Padding is masked; a classifier of a decoder must know its id. An object is what a saved tokenizer has there.
        tokenizer.pad_token = tokenizer.added_tokens_decoder.get(tokenizer.eos_token_id, tokenizer.eos_token)
    if getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return make_text_preprocess(config, blueprint, head, tokenizer, _positions(blueprint, settings))


def _positions(blueprint: nn.Module, settings: Any) -> int | None:
    """Return the maximum number of positions; RoBERTa-like networks count from after the padding token's id."""
    stated: int | None = getattr(settings, "max_position_embeddings", None)
    for path, module in blueprint.named_modules():
        if isinstance(module, nn.Embedding) and "position" in path and module.num_embeddings == stated:
            return stated - (0 if module.padding_idx is None else module.padding_idx + 1)
    return stated


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's own report of missing weights, which is checked here."""
    control: Any = transformers_log
    verbosity, bars = control.get_verbosity(), control.is_progress_bar_enabled()
    control.set_verbosity_error()
    control.disable_progress_bar()
    try:
        yield
    finally:
        control.set_verbosity(verbosity)
        if bars:
            control.enable_progress_bar()
