"""Adapters: small trainable layers beside frozen pretrained ones after the cut, merged into plain weights at the end.

`peft` builds them in a copy of the model, whose suffix after the same cut contains them like any other layer; prefix,
recipe and store are unaffected. A run keeps `merged` weights: every adapter added to the weight it
adapts, under the names of the full model, so that nothing after training depends on adapters.
"""

import copy
import logging
import re
import warnings
from collections import Counter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, TrainError
from pipeline.split import State, Suffix, with_model
from pipeline.split.forward import observed_calls
from pipeline.split.regions import keeps_statistics
from pipeline.split.suffix import output_in_eval
from pipeline.split.tree import difference, tensors
from pipeline.train.config import AdapterConfig

log = logging.getLogger("recycle")

NAME = "default"
"""Name that peft gives the adapter of a layer."""
MERGED_TOLERANCE = 1e-3
"""Largest relative difference between adapted and merged outputs on random adapters. Rounding through many layers stays
far below it; a weight that the model also uses without calling its layer exceeds it."""


def adapt(
    model: nn.Module,
    suffix: Suffix,
    state: State,
    example: dict[str, Tensor],
    config: AdapterConfig,
    *,
    fresh: frozenset[str],
    seed: int,
) -> Suffix:
    """Return a suffix like `suffix` with trainable adapters and new parameters; everything else is frozen.

    Before training, it computes the same as `suffix`.

    Args:
        model: the model of `suffix`, left unchanged; its weights before the cut may be on the meta device.
        state: the state of a batch, on which the merging is proved.
        example: the inputs of that batch.
        fresh: names of the parameters that were not pretrained.
        seed: seed of the adapters' initial weights.

    Raises:
        ConfigError: `config.targets` names a layer that cannot be adapted.
        TrainError: no layer after the cut can be adapted, or merging would change the outputs.
    """
    targets = _targets(suffix, state, example, config, fresh)
    if not targets:
        log.warning("%s: after this cut there is no pretrained layer to adapt; fresh layers train alone", config.kind)
    # It shares the memory of the weights, which are frozen.
    twin = copy.deepcopy(model, {id(item): nn.Parameter(item.detach(), False) for item in model.parameters()})
    known = {path for path, _ in twin.named_modules()}
    if targets:
        _inject(twin, targets, config, seed)
    _keep_statistics(twin, fresh)
    for name in fresh & dict(twin.named_parameters()).keys():
        twin.get_parameter(name).requires_grad_()
    adapted = with_model(suffix, twin, {path for path, _ in twin.named_modules()} - known)
    _prove(adapted, suffix, state, example, config)
    sizes = [(item.numel(), item.requires_grad) for item in adapted.parameters()]
    log.info("%s on %d layers: %d parameters train", config.kind, len(targets), sum(size for size, on in sizes if on))
    return adapted


def merged(suffix: Suffix) -> dict[str, Tensor]:
    """Return the state dict of `suffix` with its adapters merged, under the names of the plain suffix."""
    weights: dict[str, Tensor] = suffix.state_dict()
    for path, layer in _adapters(suffix).items():
        inside = [name for name in weights if name.startswith(f"{path}.")]
        for name in inside:
            tensor = weights.pop(name)
            if name.startswith(f"{path}.base_layer."):
                weights[f"{path}.{name.removeprefix(f'{path}.base_layer.')}"] = tensor
        with torch.no_grad():
            weight = weights[f"{path}.weight"]
            weights[f"{path}.weight"] = (weight + layer.get_delta_weight(NAME).to(weight.dtype)).contiguous()
    return weights


def _adapters(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _can_adapt(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether peft can adapt `module` and merge the adapter.

    It cannot for subclasses with their own `forward`, grouped convolutions, dilation, and padding other than zeros.
    """
    plain = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    if plain and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return plain


def _targets(
    suffix: Suffix, state: State, example: dict[str, Tensor], config: AdapterConfig, fresh: frozenset[str]
) -> list[str]:
    """Return the paths of the layers to adapt: called, pretrained, with a trainable weight that is not shared.

    There may be none if only normalisation and new layers follow the cut.
    """
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    called: set[str] = set()  # the weights of modules that are not called are used in other ways
    with observed_calls(suffix, lambda path, *_: called.add(path)):
        output_in_eval(suffix, state, (), example)
    held = Counter(id(item) for _, item in suffix.named_parameters(remove_duplicate=False))
    unshared = {name for name, item in suffix.named_parameters() if held[id(item)] == 1}
    layers = {path: module for path, module in suffix.named_modules() if f"{path}.weight" in unshared - fresh}
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D) if config.kind == "lora" else ()
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *convolutions)
    known = [path for path, module in layers.items() if path in called and _can_adapt(module, kinds)]
    pretrained = [path for path, module in layers.items() if module.get_parameter("weight").dim() > 1]
    if not known and (pretrained or config.targets or not fresh & unshared):
        others = sorted({type(module).__name__ for module in layers.values()})
        raise TrainError(
            f"train.adapter is {config.kind}, which adapts {', '.join(kind.__name__ for kind in kinds)}; after "
            f"the cut {suffix.cut} there is no such pretrained layer (but {', '.join(others) or 'none with weights'}); "
            "choose a lower cut or another adapter, or remove train.adapter"
        )
    if config.targets is None:
        return known
    chosen = {end: [path for path in known if f".{path}".endswith(f".{end}")] for end in config.targets}
    for end, paths in chosen.items():
        if not paths:
            ends = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in known))
            raise ConfigError(
                f"train.adapter.targets has {end!r}; no layer that {config.kind} can adapt after the cut {suffix.cut} "
                f"ends so; they end in {ends}"
            )
    return [path for path in known if any(path in paths for paths in chosen.values())]


def _inject(twin: nn.Module, targets: list[str], config: AdapterConfig, seed: int) -> None:
    from peft import LoraConfig, PeanutConfig, PeftConfig, inject_adapter_in_model  # noqa: PLC0415

    others = f"(?!(?:{'|'.join(map(re.escape, targets))})$).*"  # without it peft takes a path for the end of others too
    settings: PeftConfig
    if config.kind == "lora":
        settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout)
    else:
        settings = PeanutConfig(r=config.rank, scaling=config.alpha / config.rank, depth=0)
    settings.target_modules, settings.exclude_modules = targets, others
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # they are on settings made here
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, twin, NAME)
        except ValueError as error:  # of some networks it knows that they read a weight behind its layer's back
            raise TrainError(f"train.adapter: {error}; leave that layer out with train.adapter.targets") from error
    if missed := set(targets) ^ _adapters(twin).keys():
        raise TrainError(
            f"train.adapter: peft adapts other layers of this model than it was told, {min(missed)!r} among them; "
            "name the layers in train.adapter.targets"
        )


def _keep_statistics(twin: nn.Module, fresh: frozenset[str]) -> None:
    """Keep pretrained batch normalisation in eval mode in every mode of the model."""
    for path, module in twin.named_modules():
        own = {f"{path}.{name}" for name in module._parameters}
        if keeps_statistics(module) and not own & fresh:
            module.eval()
            module.train = MethodType(_train_children, module)


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    for child in module.children():
        child.train(mode)
    return module


def _prove(adapted: Suffix, plain: Suffix, state: State, example: dict[str, Tensor], config: AdapterConfig) -> None:
    """Compare the suffix with random adapters with the plain suffix into which they are merged."""
    weights = [item for layer in _adapters(adapted).values() for item in layer.parameters() if item.requires_grad]
    before = [item.detach().clone() for item in weights]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for item in weights:
            item.normal_(std=0.02)
    plain.load_state_dict(merged(adapted))
    expected, found = (tensors(output_in_eval(half, state, (), example)) for half in (adapted, plain))
    gap = max(difference(tensor, found[leaf]) for leaf, tensor in expected.items())
    with torch.no_grad():
        for item, former in zip(weights, before, strict=True):
            item.copy_(former)
    plain.load_state_dict(merged(adapted))
    if not gap <= MERGED_TOLERANCE:
        raise TrainError(
            f"train.adapter is {config.kind}; merged, it would move the outputs by {gap:.1e} (relative; bound "
            f"{MERGED_TOLERANCE}): the model reads a weight otherwise than by calling its layer; leave that layer out "
            "with train.adapter.targets"
        )
