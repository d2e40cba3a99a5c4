"""The pretrained suffix, kept beside its store: what a run needs of the network that encoded it.

    <cut>/suffix/suffix.json            digests of the files; the recipe, the model section and the head they belong to
    <cut>/suffix/split.json             the proved split, the digest of every module, the new tensors of the head
    <cut>/suffix/model.safetensors      the pretrained weights that the suffix reads
    <cut>/suffix/new.safetensors        the initial values of the network's own new head
    <cut>/suffix/constants.safetensors  values that cross the cut and belong to no sample
    <cut>/suffix/backbone/              configuration and tokenizer, as the network's library reads them

With it a run starts without the layers before the cut: the network is built with its parameters on the meta device,
those of the suffix are filled in, and nothing is run. That is right where the network built here has the modules that
the split was proved on, which their digests show, and where the weights are those of the recipe: the files that they
were read from are unchanged since, or are not on this machine at all.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import AbsentError, CorruptStoreError
from pipeline.keys import JSON, first_difference, parse_json, tensors_digest
from pipeline.models import Backbone, ModelConfig, PreprocessConfig, as_described, describe, fill, load
from pipeline.models.fingerprint import Irrelevant, module_fingerprints
from pipeline.project.recipe import IRRELEVANT
from pipeline.split import Suffix, load_suffix, save_split, value_of
from pipeline.store import SUFFIX, Store, read_attachment, remove_attachment, write_attachment
from pipeline.tasks import Head

log = logging.getLogger("recycle")

SPLIT = "split.json"
WEIGHTS = "model.safetensors"
NEW = "new.safetensors"
CONSTANTS = "constants.safetensors"
BACKBONE = "backbone"
"""Folder with the configuration of the network."""

HOW_LOADED: Irrelevant = {
    **IRRELEVANT,
    "transformers.PreTrainedModel": IRRELEVANT["transformers.PreTrainedModel"]
    | {"_weight_conversions", "_use_kernels", "_is_hf_initialized"},
}
"""`IRRELEVANT`, with what `from_pretrained` leaves on a network beside its weights."""
LIBRARIES = frozenset({"timm", "torchvision", "transformers"})
"""Packages that define networks; the digest of a module has the name of its class, not the code."""
NO_CLASSIFIER = "classifier_replaced"
"""Key of what describes a head: true where `task.layers` replace the pretrained classifier."""


@dataclass(frozen=True)
class SavedSplit:
    """A suffix without its trainable weights, which the model has too."""

    trained: frozenset[str]
    """Names of the parameters and buffers of the model that the suffix trains."""
    frozen: frozenset[str]
    """Names of the parameters that it reads, and leaves as they are."""
    constants: Mapping[str, Tensor]
    """`Suffix.constants`, by their sources as text."""
    split: Mapping[str, JSON] | None
    """As `save_split` returns it."""

    @classmethod
    def of(cls, suffix: Suffix) -> "SavedSplit":
        """Return what to keep of `suffix`."""
        parameters = suffix.named_parameters(remove_duplicate=False)
        trained = frozenset(name for name, _ in [*parameters, *suffix.named_buffers(remove_duplicate=False)])
        constants = {str(source): tensor for source, tensor in suffix.constants.items()}
        return cls(trained, frozenset(suffix.frozen.kept), constants, save_split(suffix))


def write_pretrained_suffix(
    store: Store, backbone: Backbone, modules: Mapping[str, str], model: ModelConfig, head: Head, saved: SavedSplit
) -> None:
    """Write the pretrained suffix of `backbone` into the plain `store` of its cut; `modules` are its `built_modules`.

    Raises:
        StoreError: it cannot be written.
    """
    if not model.has_weights_in_files or saved.split is None:
        remove_attachment(store, SUFFIX)
        return
    network, names = backbone.pretrained(model.library)
    own = backbone.model.state_dict(keep_vars=True)
    # `network` may name its tensors differently from `backbone.model`: they are found by identity.
    exact = {id(own[name]): item for name, item in backbone.exact.items() if name in saved.trained}
    read = {id(item) for name, item in own.items() if name in saved.trained | saved.frozen}
    chosen = {
        id(item): (name, item)  # tied tensors once
        for name, item in reversed(network.state_dict(keep_vars=True).items())
        if name in names and (id(item) in read or not isinstance(item, nn.Parameter))
    }
    kept = {name: exact[key] if key in exact else value_of(item) for key, (name, item) in chosen.items()}
    fresh = frozenset[str]() if _has_own_layers(model, head) else backbone.fresh & own.keys()
    new = {name: exact.get(id(own[name]), own[name]) for name in fresh}
    description = {
        "split": saved.split,
        "modules": modules,
        "buffers": _unsaved_buffers(backbone),
        "libraries": _libraries(backbone),
        "features": backbone.features,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "new": sorted(new),
    }

    def write(folder: Path) -> None:
        for file, tensors in ((WEIGHTS, kept), (NEW, new), (CONSTANTS, saved.constants)):
            save_file(_apart(tensors), folder / file)
        (folder / SPLIT).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (folder / BACKBONE).mkdir()
        describe(model, backbone, folder / BACKBONE)

    about: dict[str, JSON] = {
        "recipe": store.recipe.digest,
        "model": model.model_dump(mode="json"),
        "head": _described(model, head),
    }
    if written := write_attachment(store, SUFFIX, about, write):
        log.info("%s carries the pretrained weights after the cut (%.1f MB)", store.where, written / 1e6)


@dataclass(frozen=True)
class PretrainedSuffix:
    """The pretrained suffix of a store, checked to belong to it and to the current settings."""

    store: Store
    folder: Path
    description: Mapping[str, Any]
    """The contents of split.json."""

    @classmethod
    def of(cls, store: Store, model: ModelConfig, head: Head) -> "PretrainedSuffix":
        """Open the pretrained suffix of `store` for the network and the head of the current settings.

        Raises:
            AbsentError: there is none, or one of other settings; the message names them.
            CorruptStoreError: it is damaged.
        """
        found = read_attachment(store, SUFFIX)
        if found is None:
            raise AbsentError(f"{store.where} carries no weights to train from (encode.suffix)")
        folder, about = found
        if about.get("recipe") != store.recipe.digest:
            raise CorruptStoreError(f"{folder} belongs to another store; encode again where the model is")
        if not (folder / SPLIT).exists():
            raise AbsentError(
                f"the weights that {store.where} carries were written by an earlier version; encode again where the "
                "model is: no sample is encoded twice"
            )
        wanted = {"model": model.model_dump(mode="json"), "head": _described(model, head)}
        if wanted["head"].get(NO_CLASSIFIER):  # a classifier that is not used may be there
            about = about | {"head": {**dict(about["head"]), NO_CLASSIFIER: True}}
        if changed := first_difference({name: about.get(name) for name in wanted}, wanted):
            setting, then, now = changed
            raise AbsentError(
                f"the weights that {store.where} carries are of {setting} = {then!r}, today's is {now!r}; set it back, "
                "or encode again where the model is"
            )
        return cls(store, folder, parse_json((folder / SPLIT).read_text(encoding="utf-8")))

    def build(self, model: ModelConfig, preprocess: PreprocessConfig, head: Head) -> Backbone:
        """Return the backbone that `model` names, with weights after the cut alone.

        Raises:
            AbsentError: it is another network than the one that was split; the message names a module.
            ConfigError, ModelError: as `models.load`.
        """
        typed = model.model_copy(update={"dtype": self.description["dtype"]})
        described = as_described(typed, preprocess, self.folder / BACKBONE)
        backbone = load(*described, head, features=self.description["features"])
        network, _ = backbone.pretrained(model.library)
        built = backbone.model.state_dict(keep_vars=True)
        try:
            fill(network, load_file(self.folder / WEIGHTS))
            fill(backbone.model, load_file(self.folder / NEW))
        except ValueError as error:
            raise AbsentError(f"the weights that {self.store.where} carries do not fit: {error}") from error
        fresh = backbone.fresh if _has_own_layers(model, head) else frozenset(self.description["new"])
        filled = {name for name, item in backbone.model.state_dict(keep_vars=True).items() if item is not built[name]}
        exact = {name: item for name, item in backbone.exact.items() if name not in filled}
        backbone = replace(backbone, name=model.backbone, fresh=fresh, exact=exact)
        if reason := self._difference(backbone):
            raise AbsentError(
                f"the weights that {self.store.where} carries are of another network: {reason}; encode again where the "
                "model is"
            )
        return backbone

    def suffix(self, backbone: Backbone) -> Suffix:
        """Return the suffix of a backbone that `build` made; the two share their weights.

        Raises:
            CorruptStoreError: another version of this package described the split in another way.
        """
        added = {path for path, _ in backbone.model.named_modules()} - self.description["modules"].keys()
        try:
            return load_suffix(backbone.model, self.description["split"], load_file(self.folder / CONSTANTS), added)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStoreError(
                f"{self.folder / SPLIT} does not describe a split ({type(error).__name__}: {error}); remove the "
                "folder, and encode where the model is: no sample is encoded twice"
            ) from error

    def _difference(self, backbone: Backbone) -> str | None:
        """Return how the network differs from the one that was split, except in the layers of `task.layers`."""
        if changed := first_difference(self.description["libraries"], _libraries(backbone)):
            library, before, now = changed
            return f"it was split with {library} {before}, here is {now}, whose code may differ"
        then, modules, layers = self.description["modules"], built_modules(backbone), backbone.layers_path
        for path in {**then, **modules}:
            in_layers = layers is not None and f"{path}.".startswith(f"{layers}.")
            if not in_layers and then.get(path) != modules.get(path):
                return f"module {path!r} has other attributes, or is not there"
        return None if self.description["buffers"] == _unsaved_buffers(backbone) else "a buffer has other values"


def built_modules(backbone: Backbone) -> dict[str, str]:
    """Return the digests of the modules of `backbone` by path, however its weights were loaded.

    Call it before the first forward pass.
    """
    return module_fingerprints(backbone.model, HOW_LOADED)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, with copies of those that share memory with another one."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, item in tensors.items():
        whole = item.detach().cpu().contiguous()
        storage = whole.untyped_storage()
        # A tensor that is part of a larger one is copied: a file would hold all of that.
        if storage.data_ptr() in seen or storage.nbytes() != whole.nbytes:
            whole = whole.clone()
        seen.add(whole.untyped_storage().data_ptr())
        found[name] = whole
    return found


def _has_own_layers(model: ModelConfig, head: Head) -> bool:
    """Return whether the new tensors of the network are those of `task.layers`, drawn from `model.seed` alone."""
    return model.library != "function" and (head.kind == "embedding" or bool(head.layers))


def _described(model: ModelConfig, head: Head) -> dict[str, JSON]:
    """Return the properties of the head that decide which weights the network has, but for those of `task.layers`."""
    described = {name: getattr(head, name) for name in ("kind", "size", "pooling")}
    described |= {"untied": True} if head.untied else {}
    if model.library == "function":
        return described | {"layers": list(head.layers)}
    return described | ({NO_CLASSIFIER: True} if head.layers and head.kind != "embedding" else {})


def _libraries(backbone: Backbone) -> dict[str, JSON]:
    """Return the versions of the packages of networks that the modules are from."""
    packages = {type(module).__module__.partition(".")[0] for module in backbone.model.modules()}
    return {name: version(name) for name in sorted(packages & LIBRARIES)}


def _unsaved_buffers(backbone: Backbone) -> str:
    """Return the digest of the buffers that the network computes anew whenever it is built."""
    saved = backbone.model.state_dict().keys()
    return tensors_digest({name: item for name, item in backbone.model.named_buffers() if name not in saved})
