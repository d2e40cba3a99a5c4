"""What decides the values of a state, read off a prefix and its preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pipeline.keys import JSON, Recipe, digest, tensors_digest
from pipeline.split import Prefix
from pipeline.store import FORMAT

NOT_COMPUTED = frozenset({"training", "name_or_path"})
"""Attributes that decide no value: the mode, which is always eval, and the folder a network was loaded from."""


def recipe_of(prefix: Prefix, preprocessing: Mapping[str, JSON], *, storage: str, compute_dtype: str) -> Recipe:
    """Return the recipe of the states that `prefix` makes.

    Batch size, workers and device are not in it; neither is anything after the cut: heads and tasks share a store.
    """
    return Recipe(
        format=FORMAT,
        weights=tensors_digest(prefix.weights()),
        architecture=architecture_digest(prefix.modules()),
        cut=str(prefix.cut),
        preprocessing=preprocessing,
        view=None,
        compute_dtype=compute_dtype,
        storage=storage,
    )


def architecture_digest(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Return a digest of what modules compute besides their weights: class, `extra_repr` and plain attributes.

    The plain attributes matter: two attention modules may differ in their number of heads alone.
    """
    return digest(
        [[name, type(module).__qualname__, module.extra_repr(), _settings(module)] for name, module in modules]
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in NOT_COMPUTED and isinstance(value, plain)
    }
