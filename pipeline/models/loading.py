"""load.py of an exported folder: lines of Python that load the network without this package."""

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.models.backbone import CLASSIFIER, PROJECTION, Backbone, Embedder
from pipeline.models.classifier import find_classifier
from pipeline.models.config import ModelConfig
from pipeline.models.hf_heads import HEADS
from pipeline.models.vision import Torchvision
from pipeline.tasks.base import Head
from pipeline.tasks.layers import Gate, Residual

FOLDER = "Path(__file__).parent"
"""Expression in the lines for the folder of the file."""
PROCESSORS = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
"""Kind of content -> the class of transformers that reads what an export keeps of the preprocessing."""


def loading_code(config: ModelConfig, head: Head, backbone: Backbone) -> str:
    """Return the lines that load what `backbone.save` wrote; they leave the network as `model`, in eval mode.

    Inputs are those that `backbone.json` describes.
    """
    makers = {"torchvision": _torchvision, "timm": _timm, "hf": _hf, "function": _function}
    imports, lines = makers[config.library](config, head, backbone)
    classes = [kind for kind in (Gate, Residual) if any(isinstance(one, kind) for one in backbone.model.modules())]
    definitions = [inspect.getsource(kind) for kind in classes]
    if (found := find_classifier(backbone.network)) is not None:
        path, classifier = found
        lines += [f"model.set_submodule({path!r}, {_layers(classifier)})"]
        if config.library == "hf":
            lines += [f'load_model(model.get_submodule({path!r}), folder / "{CLASSIFIER}")']
    if config.library != "hf":
        lines += ['load_model(model, folder / "model.safetensors")']
    if isinstance(backbone.model, Embedder):
        definitions += [_embedder()]
        lines += [f"model = Embedder(model, {backbone.model.pooling!r}, {_layers(backbone.model.projection)})"]
        if backbone.model.projection.state_dict():
            lines += [f'load_model(model.projection, folder / "{PROJECTION}")']
    body = "\n".join([f"folder = {FOLDER}", *lines, "model.eval()", ""])
    body = "\n\n\n".join([*(text.rstrip() for text in definitions), body])
    standard = ["from pathlib import Path", "from types import SimpleNamespace", "from typing import Any"]
    others = ["import torch", *imports, "from safetensors.torch import load_model", "from torch import Tensor, nn"]
    groups = [filter(None, (_used(line, body) for line in group)) for group in (standard, others)]
    return "\n\n".join("\n".join(group) for group in groups) + ("\n\n\n" if definitions else "\n\n") + body


def _used(line: str, body: str) -> str:
    """Return an import of what `body` uses; empty if it uses nothing of it."""
    start, _, names = line.rpartition("import ")
    used = [name for name in names.split(", ") if re.search(rf"\b{name}\b", body)]
    return f"{start}import {', '.join(used)}" if used else ""


def _torchvision(config: ModelConfig, head: Head, backbone: Backbone) -> tuple[list[str], list[str]]:
    library, classes = Torchvision(config.name, config.options), head.size or 0
    arguments = _arguments({"weights": None} | library.arguments(classes))
    lines = [f"model = torchvision.models.get_model({config.name!r}, {arguments})"]
    if not classes:
        lines += [f"model.set_submodule({path!r}, nn.Identity())" for path in library.classifiers()]
    return ["import torchvision"], lines


def _timm(config: ModelConfig, head: Head, backbone: Backbone) -> tuple[list[str], list[str]]:
    arguments = _arguments({"num_classes": head.size or 0} | config.options)
    return ["import timm"], [f"model = timm.create_model({config.name!r}, {arguments})"]


def _hf(config: ModelConfig, head: Head, backbone: Backbone) -> tuple[list[str], list[str]]:
    """Return lines for the network's class, or, of code of its own repository, for the library's automatic one."""
    kind, options = type(backbone.network), dict[str, Any]()
    name = kind.__name__
    if not kind.__module__.startswith("transformers."):
        known = getattr(backbone.network.config, "auto_map", None) or {}
        name = next((one for one in HEADS.get(head.kind, ()) if one in known), "AutoModel")
        options = {"trust_remote_code": True}
    elif (
        getattr(backbone.network, "pooler", None) is None and "add_pooling_layer" in inspect.signature(kind).parameters
    ):
        options = {"add_pooling_layer": False}
    lines = [f"model = {name}.from_pretrained({', '.join(['folder', *filter(None, [_arguments(options)])])})"]
    names = [name]
    if (processor := PROCESSORS.get(str(backbone.preprocess.recipe().get("kind")))) is not None:
        lines += [f"preprocess = {processor}.from_pretrained(folder)"]
        names += [processor]
    return [f"from transformers import {', '.join(sorted(names))}"], lines


def _function(config: ModelConfig, head: Head, backbone: Backbone) -> tuple[list[str], list[str]]:
    module, _, function = config.backbone.partition(":")
    lines = [
        f"head = SimpleNamespace({_arguments(vars(head))})",
        f"built = {function}(head)",
        "model = built if isinstance(built, nn.Module) else built.model",
    ]
    return [f"from {module} import {function}"], lines


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _layers(module: nn.Module) -> str:
    """Return an expression that makes the layers of a head."""
    if isinstance(module, nn.Sequential):
        return f"nn.Sequential({', '.join(map(_layers, module))})"
    if isinstance(module, Gate):
        return f"Gate({len(module.gates)})"
    if isinstance(module, Residual):
        return f"Residual({module.linear.in_features}, {module.dropout.p})"
    return f"nn.{module!r}"


def _embedder() -> str:
    """Return the source of a class that pools as `Embedder` does."""
    methods = "\n".join(inspect.getsource(method) for method in (Embedder.forward, Embedder.pool))
    start = """
        class Embedder(nn.Module):
            def __init__(self, backbone: nn.Module, pooling: str, projection: nn.Module) -> None:
                super().__init__()
                self.backbone, self.pooling, self.projection = backbone, pooling, projection
    """
    return f"{textwrap.dedent(start).strip()}\n\n{methods}"
