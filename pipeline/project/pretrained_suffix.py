"""The suffix as it was pretrained, carried by its store: to train from a store that somebody else encoded.

Who has the store, the sample table and params.yaml, but not the weights that params.yaml names, trains from what the
store carries: every pretrained weight that the suffix reads, what describes the network where its name alone does not,
and the constants that cross the cut. The layers before the cut are built with the weights they are drawn with; they
give the suffix its shape and are never run for a state.

What cannot be proved by the weights is proved by what `encode` wrote when it had them: the carried files by their
digests, the store by the digest of its recipe, the weights by the section `model` of params.yaml, which must be the
same. All other fields of the recipe are compared as ever.
"""

from __future__ import annotations

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
"""Folder of what describes the network."""


@dataclass(frozen=True)
class SuffixTensors:
    """What a suffix needs of the network that it was split off."""

    parameters: frozenset[str]
    """Names of those it reads, trained or not."""
    constants: Mapping[str, Tensor]
    """As `Suffix.constants`."""

    @classmethod
    def of(cls, suffix: Suffix) -> SuffixTensors:
        """Return what `suffix` needs."""
        trained = (name for name, _ in suffix.named_parameters(remove_duplicate=False))
        return cls(frozenset(trained) | suffix.frozen.kept.keys(), suffix.constants)


def write_pretrained_suffix(
    store: Store, backbone: Backbone, model: ModelConfig, head: Head, needed: SuffixTensors
) -> None:
    """Put the pretrained weights that a suffix of `backbone` needs, and what describes the network, into `store`.

    Raises:
        StoreError: the disk refuses.
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

    def fill(folder: Path) -> None:
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
    if written := write_attachment(store, SUFFIX, about, fill):
        log.info("%s carries the pretrained weights after the cut (%.1f MB)", store.where, written / 1e6)


def lacks_pretrained_suffix(store: Store, model: ModelConfig) -> bool:
    """Say whether `store` carries nothing, although it could."""
    return _can_be_missed(model) and not has_attachment(store, SUFFIX)


@dataclass(frozen=True)
class PretrainedSuffix:
    """What a store carries, proved to belong to it and to today's settings."""

    folder: Path
    recipe: Recipe
    """The store's."""
    left_out: Mapping[str, list[int]]
    """Shapes, by name, of the network's weights before the cut."""

    @classmethod
    def of(cls, store: Store, model: ModelConfig, head: Head) -> PretrainedSuffix:
        """Open what `store` carries for the network and the head of today's settings.

        Raises:
            AbsentError: it carries nothing, or the weights of other settings; the message says which.
            CorruptStoreError: it is not what was written.
        """
        recipe, found = store.recipe, read_attachment(store, SUFFIX)
        if found is None:
            raise AbsentError(f"{store.where} carries no weights to train from (encode.suffix)")
        folder, about = found
        if about.get("recipe") != recipe.digest:
            raise CorruptStoreError(f"{folder} belongs to another store; encode again where the model is")
        wanted = {"model": model.model_dump(mode="json"), "head": _described(head)}
        if changed := first_difference({name: about.get(name) for name in wanted}, wanted):
            setting, then, now = changed
            raise AbsentError(
                f"the weights that {store.where} carries are of {setting} = {then!r}, today's is {now!r}; set it back, "
                "or encode again where the model is"
            )
        return cls(folder, recipe, dict(about["left_out"]))

    def load(self, model: ModelConfig, preprocess: PreprocessConfig, head: Head) -> Backbone:
        """Return the backbone that `model` names, with the weights after the cut; those before it are drawn.

        Raises:
            ConfigError, ModelError: as `models.load`.
        """
        absent = {name: torch.empty(shape, device="meta") for name, shape in self.left_out.items()}
        state = load_file(self.folder / WEIGHTS) | absent
        return load(*as_described(model, preprocess, self.folder / BACKBONE), head, state)

    def complete(self, suffix: Suffix) -> None:
        """Give the suffix that was split off such a backbone the constants that the weights before the cut gave."""
        file = self.folder / CONSTANTS
        suffix.constants = load_file(file) if file.exists() else {}

    def prove(self, recipe: Recipe) -> Recipe:
        """Return `recipe`, read off such a backbone, with the digest of the weights that the store was made of."""
        return replace(recipe, weights=self.recipe.weights)


def _can_be_missed(model: ModelConfig) -> bool:
    """Say whether the weights are anywhere else than in a seed or in the user's own code."""
    return model.weights is not None and (model.library != "function" or model.has_file)


def _described(head: Head) -> dict[str, JSON]:
    """What decides which pretrained weights a network with this head has."""
    return {name: getattr(head, name) for name in ("kind", "size", "pooling")}
