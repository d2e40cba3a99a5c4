"""The recipe of a store of the library: what decides its states, and how a split remembers it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipeline import split as splitting
from pipeline.errors import StaleStoreError
from pipeline.keys import JSON, Recipe
from pipeline.library.items import Collate, Key
from pipeline.models import texts
from pipeline.models.fingerprint import fingerprint, module_fingerprints
from pipeline.precision import ComputeFormat, weights_dtype
from pipeline.project.recipe import IRRELEVANT, recipe_of
from pipeline.split import Prefix, Suffix
from pipeline.store import Store

REMEDY = "set it back; or encode to another folder, or remove this one: nothing is replaced"
OF_CODE = {**IRRELEVANT, "transformers.PreTrainedTokenizerBase": texts.IRRELEVANT}


def split(model: nn.Module, at: float | str, example: Any) -> tuple[Prefix, Suffix]:
    """Cut `model` in two: `suffix(prefix(x), x)` equals `model(x)`, in eval and train mode, gradients too.

    Args:
        model: any module; it is left unchanged. The suffix holds copies of the weights it trains.
        at: a share of the blocks (0: full fine-tuning from the inputs, 1: head only), a whole number of blocks from 2
            on, a module path, or `path#2` for the third call of a module. `candidates` lists the places.
        example: a batch of at least 2 samples as the model is called with it: a mapping of named arguments, a tuple, or
            one tensor. Labels may be among them.

    Raises:
        InputRefusedError: the model's own code fails on the example.
        NoSuchCutError: `at` names no place in the model.
        SplitError: the model cannot be split exactly there; the message names the reason.
    """
    modules = module_fingerprints(model, IRRELEVANT)  # before a forward pass changes what modules remember
    prefix, suffix = splitting.split(model, at, example, values=True)
    prefix.module_digests = modules
    return prefix, suffix


def recipe_for(prefix: Prefix, storage: str, collate_fn: Collate | None, key: Key | None) -> Recipe:
    """Return the recipe of the states that `prefix` makes of what `collate_fn` returns."""
    return recipe_of(
        prefix,
        {
            "kind": "library",
            "inputs": sorted(prefix.inputs.read),
            "collate_fn": _code(collate_fn),
            "key": _code(key),
        },
        storage=storage,
        compute_dtype=compute_dtype(prefix),
        modules=prefix.module_digests,
    )


def compute_dtype(prefix: Prefix) -> str:
    """Return the name of the type that `prefix` computes in: that of its weights."""
    weights = weights_dtype(prefix.model.parameters())
    return ComputeFormat.of(torch.device("cpu"), weights, None, channels_last=False).precision


def check_network(store: Store, prefix: Prefix, collate_fn: Collate | None) -> None:
    """Raise StaleStoreError unless the states are of `prefix` and, if it is given, `collate_fn`.

    What the caller does not know is taken from the store: its storage, and the code of `key`.
    """
    known: Mapping[str, Any] = store.recipe.preprocessing
    expected = recipe_for(prefix, store.recipe.storage, collate_fn, None)
    given = {"collate_fn"} if collate_fn else set()
    preprocessing: dict[str, JSON] = {
        name: expected.preprocessing[name] if name in {"kind", "inputs"} | given else value
        for name, value in known.items()
    }
    check(store, replace(expected, preprocessing=preprocessing))


def check(store: Store, expected: Recipe) -> None:
    """Raise StaleStoreError, which names the first difference and the ways out, unless `store` is of this recipe."""
    try:
        store.check_recipe(expected)
    except StaleStoreError as error:
        raise StaleStoreError(error.difference, REMEDY) from None


def _code(function: Collate | Key | None) -> str | None:
    return None if function is None else fingerprint(function, OF_CODE)
