"""The pretrained suffix, kept beside its store, so that a store encoded on another machine can be trained from.

With the store, the sample table and params.yaml, but without the weights that params.yaml names, training uses the
pretrained suffix: every pretrained weight that the suffix reads, the configuration of the network, and the constants
that cross the cut. The layers before the cut are built with random weights; they only give the suffix its shape.

What the missing weights would prove is proved by digests that `encode` wrote: of the files of the pretrained suffix and
of the store's recipe; and the section `model` of params.yaml must be the same. All other fields of the recipe are
compared as usual.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import AbsentError, CorruptStoreError
from pipeline.keys import JSON, Recipe, first_difference
from pipeline.models import Backbone, ModelConfig, PreprocessConfig, as_described, describe, load
from pipeline.split import Suffix
from pipeline.store import SUFFIX, Store, has_attachment, read_attachment, remove_attachment, write_attachment
from pipeline.tasks import Head

log = logging.getLogger("recycle")

WEIGHTS = "model.safetensors"
CONSTANTS = "constants.safetensors"
BACKBONE = "backbone"
"""Folder with the configuration of the network."""

NO_CLASSIFIER = "classifier_replaced"
"""Key of what describes a head: true where `task.layers` replace the pretrained classifier."""


@dataclass(frozen=True)
class SuffixTensors:
    """The parameters and constants of the full network that a suffix needs."""

    parameters: frozenset[str]
    """Names of the parameters that it reads, trained or not."""
    constants: Mapping[str, Tensor]
    """As `Suffix.constants`."""

    @classmethod
    def of(cls, suffix: Suffix) -> "SuffixTensors":
        """Return the parameters and constants that `suffix` needs."""
        trained = (name for name, _ in suffix.named_parameters(remove_duplicate=False))
        return cls(frozenset(trained) | suffix.frozen.kept.keys(), suffix.constants)


def write_pretrained_suffix(
    store: Store, backbone: Backbone, model: ModelConfig, head: Head, needed: SuffixTensors
) -> None:
    """Write the pretrained weights that a suffix of `backbone` needs, and the network's configuration, into `store`.

    Raises:
        StoreError: they cannot be written.
    """
    if not _can_be_missed(model):
        remove_attachment(store, SUFFIX)
        return
    network, names = backbone.pretrained(model.library)
    whole = backbone.model.named_parameters(remove_duplicate=False)
    read = {id(item) for name, item in whole if name in needed.parameters}  # whatever names they have in `network`
    parameters = dict(network.named_parameters(remove_duplicate=False))
    state = {name: tensor for name, tensor in network.state_dict().items() if name in names}
    left_out = {n: list(t.shape) for n, t in state.items() if n in parameters and id(parameters[n]) not in read}

    def write(folder: Path) -> None:
        kept = {name: tensor.cpu().contiguous().clone() for name, tensor in state.items() if name not in left_out}
        save_file(kept, folder / WEIGHTS)
        if needed.constants:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in needed.constants.items()}, folder / CONSTANTS
            )
        (folder / BACKBONE).mkdir()
        describe(model, backbone, folder / BACKBONE)

    about: dict[str, JSON] = {
        "recipe": store.recipe.digest,
        "model": model.model_dump(mode="json"),
        "head": _described(head),
        "left_out": left_out,
    }
    if written := write_attachment(store, SUFFIX, about, write):
        log.info("%s carries the pretrained weights after the cut (%.1f MB)", store.where, written / 1e6)


def lacks_pretrained_suffix(store: Store, model: ModelConfig) -> bool:
    """Return whether `store` could have a pretrained suffix but has none."""
    return _can_be_missed(model) and not has_attachment(store, SUFFIX)


@dataclass(frozen=True)
class PretrainedSuffix:
    """The pretrained suffix of a store, checked to belong to it and to the current settings."""

    folder: Path
    recipe: Recipe
    """The recipe of the store."""
    left_out: Mapping[str, list[int]]
    """Shapes, by name, of the network's weights before the cut."""

    @classmethod
    def of(cls, store: Store, model: ModelConfig, head: Head) -> "PretrainedSuffix":
        """Open the pretrained suffix of `store` for the network and the head of the current settings.

        Raises:
            AbsentError: there is none, or one of other settings; the message names them.
            CorruptStoreError: it is damaged.
        """
        recipe, found = store.recipe, read_attachment(store, SUFFIX)
        if found is None:
            raise AbsentError(f"{store.where} carries no weights to train from (encode.suffix)")
        folder, about = found
        if about.get("recipe") != recipe.digest:
            raise CorruptStoreError(f"{folder} belongs to another store; encode again where the model is")
        wanted = {"model": model.model_dump(mode="json"), "head": _described(head)}
        if wanted["head"].get(NO_CLASSIFIER):  # a classifier that is not used may be there
            about = about | {"head": {**dict(about["head"]), NO_CLASSIFIER: True}}
        if changed := first_difference({name: about.get(name) for name in wanted}, wanted):
            setting, then, now = changed
            raise AbsentError(
                f"the weights that {store.where} carries are of {setting} = {then!r}, today's is {now!r}; set it back, "
                "or encode again where the model is"
            )
        return cls(folder, recipe, dict(about["left_out"]))

    def load(self, model: ModelConfig, preprocess: PreprocessConfig, head: Head) -> Backbone:
        """Return the backbone that `model` names, with pretrained weights after the cut and random ones before it.

        Raises:
            ConfigError, ModelError: as `models.load`.
        """
        absent = {name: torch.empty(shape, device="meta") for name, shape in self.left_out.items()}
        state = load_file(self.folder / WEIGHTS) | absent
        return load(*as_described(model, preprocess, self.folder / BACKBONE), head, state)

    def complete(self, suffix: Suffix) -> None:
        """Give a suffix split off such a backbone the constants computed with the pretrained weights before the cut."""
        file = self.folder / CONSTANTS
        suffix.constants = load_file(file) if file.exists() else {}

    def prove(self, recipe: Recipe) -> Recipe:
        """Return `recipe`, computed on such a backbone, with the weights' digest of the store."""
        return replace(recipe, weights=self.recipe.weights)


def _can_be_missed(model: ModelConfig) -> bool:
    """Return whether the weights come from files, not from a seed or the user's own code."""
    return model.weights is not None and (model.library != "function" or model.has_file)


def _described(head: Head) -> dict[str, JSON]:
    """Return the properties of the head that decide which pretrained weights the network has."""
    described = {name: getattr(head, name) for name in ("kind", "size", "pooling")}
    return described | ({NO_CLASSIFIER: True} if head.layers and head.kind != "embedding" else {})
