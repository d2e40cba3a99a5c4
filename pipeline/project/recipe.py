"""The recipe of a state: digests of everything that decides its values."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipeline.keys import JSON, Recipe, digest, tensors_digest
from pipeline.store import FORMAT

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.fingerprint import Irrelevant
    from pipeline.split import Prefix

IRRELEVANT: "Irrelevant" = {
    "transformers.PreTrainedConfig": frozenset(
        {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"}  # names
        | {"id2label", "label2id", "num_labels", "problem_type"}  # of the head
        | {"dtype", "torch_dtype"}  # of the file; networks are built in float32
    ),
    "transformers.PreTrainedModel": frozenset({"name_or_path", "num_labels", "warnings_issued"}),
    "transformers.GenerationMixin": frozenset({"generation_config"}),  # how texts are written
    "timm": frozenset({"num_classes"}),
    "torchvision": frozenset({"num_classes"}),
    "pipeline.Embedder": frozenset({"layers", "features"}),  # what follows pooling
    "pipeline.LanguageModel": frozenset({"parts", "on_all"}),  # of the head
}
"""Attributes, by base class or package, that decide no state: names, paths, versions, and the size of the head."""


def recipe_of(
    prefix: "Prefix",
    preprocessing: Mapping[str, JSON],
    *,
    storage: str,
    compute_dtype: str,
    modules: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the recipe of the states of `prefix`.

    Batch size, workers and device are not in it; neither is anything after the cut: heads and tasks share a store.
    `modules` are the digests of the modules, computed before the first forward pass (`module_fingerprints`).
    """
    from pipeline.models.fingerprint import module_fingerprints  # noqa: PLC0415  (torch is slow to import)

    if modules is None:
        modules = module_fingerprints(prefix.model, IRRELEVANT)
    return Recipe(
        format=FORMAT,
        weights=tensors_digest(_weights(prefix)),
        architecture=digest([[path, modules[path]] for path in _involved(prefix)]),
        cut=str(prefix.cut),
        preprocessing=preprocessing,
        view=None,
        compute_dtype=compute_dtype,
        storage=storage,
    )


def _weights(prefix: "Prefix") -> "Mapping[str, Tensor]":
    """Return the weights that are read before the cut, whether a language head shares those of the embeddings or not.

    Tied weights are read under all their names.
    """
    return prefix.weights(without=getattr(prefix.model, "head_weight", None))


def _involved(prefix: "Prefix") -> Iterator[str]:
    """Yield the paths of the modules that decide the state.

    These are the modules that are called before the cut, in the order of their first call; then those that hold a
    weight that is read there, and all that contain any of them.
    """
    called = [path for path, _ in prefix.modules()]
    holders = {name.rpartition(".")[0] for name in _weights(prefix)}
    around = {outer for path in (*called, *holders) for outer in _and_outer(path)}
    yield from called
    yield from sorted(around - set(called))


def _and_outer(path: str) -> Iterator[str]:
    yield ""
    yield from itertools.accumulate(path.split(".") if path else [], "{}.{}".format)
