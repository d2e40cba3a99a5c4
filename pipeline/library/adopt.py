"""Features that exist already -> a store, whose recipe says that they were adopted, and what the user vouches for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError, first_few
from pipeline.keys import KEY_BYTES, Recipe, content_key
from pipeline.library.features import Features, open_features
from pipeline.library.fields import Column, columns_of, join_columns
from pipeline.library.items import tensor_content
from pipeline.library.recipe import check
from pipeline.library.store import StateStore
from pipeline.library.table import ItemTable, table_path
from pipeline.split.inputs import ExampleInputs
from pipeline.store import FORMAT, Store

ADOPTED = "adopted"
BLOCK = 512
"""Items of a segment."""
FLOATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def adopt(
    source: Mapping[str, Any] | Path | str,
    path: Path | str,
    ids: str | Sequence[str | int] | None = None,
    fields: Iterable[str] = (),
    about: str = "",
    split: str = "train",
) -> StateStore:
    """Put features that another program made into the store at `path`, byte for byte, and return the store.

    Args:
        source: arrays by name, each with one entry per item; a file .h5, .npz or .safetensors of such arrays; or a
            folder of .pt files, one per item, each a tensor or tensors by name.
        ids: a name for each item, or the name of the array that has them; kept as the field `id`. Of a folder, the
            names of its files by default.
        fields: names of arrays that are no states, such as labels.
        about: what you vouch for: the network, its layer, the preprocessing. It is in the recipe.
        split: name of this data set in the store; it replaces the one of this name.

    Raises:
        StaleStoreError: a store of something else is there.
        DataError: the source cannot be read, ids are missing or occur twice, or values cannot be stored as they are.
    """
    with ExitStack() as stack:
        found = open_features(source, stack)
        names, labels = _ids(found, ids), set(fields)
        if unknown := sorted((labels | ({ids} if isinstance(ids, str) else set())) - found.arrays.keys()):
            raise DataError(f"there is no array {unknown[0]!r}; there are {', '.join(found.arrays)}")
        states = [name for name in found.arrays if name not in labels and name != ids]
        if not states or not found.count:
            raise DataError(f"source has no features; its arrays are {', '.join(found.arrays) or 'none'}, of no length")
        store = _open(Path(path), found, states, about)
        keys, columns = list[np.ndarray](), list[dict[str, Column]]()
        for begin in range(0, found.count, BLOCK):
            end = min(begin + BLOCK, found.count)
            keys.append(_write(store, found, states, names[begin:end], begin))
            read = {name: found.arrays[name](begin, end) for name in sorted(labels)} | {"id": names[begin:end]}
            columns.append(columns_of([dict(zip(read, row, strict=True)) for row in zip(*read.values(), strict=True)]))
    table = ItemTable(np.concatenate(keys), np.arange(len(names)), join_columns(columns))
    table.write(table_path(store.path, split), store.recipe.digest)
    return StateStore.open(Store.open(store.path), split, ExampleInputs())


def _ids(found: Features, ids: str | Sequence[str | int] | None) -> list[str | int]:
    if isinstance(ids, str) and ids in found.arrays:
        read = found.arrays[ids](0, found.count)
        names: list[Any] = [value.item() if isinstance(value, Tensor) else value for value in read]
    else:
        names = list(ids if ids is not None and not isinstance(ids, str) else found.names or [])
    if len(names) != found.count:
        raise DataError(
            f"ids are {len(names)}, and items {found.count}; give one id for each, or the name of their array"
        )
    if len(set(names)) < len(names):
        twice = [str(name) for name, count in Counter(names).items() if count > 1]
        raise DataError(f"{len(twice)} ids occur twice: {first_few(twice)}; give each item its own")
    return names


def _open(path: Path, found: Features, states: Sequence[str], about: str) -> Store:
    """Open or create the store; its type is that of the features, so that no value changes."""
    types = set()
    for name in states:
        (value,) = found.arrays[name](0, 1)
        if not isinstance(value, Tensor):
            raise DataError(f"{name} holds {type(value).__name__}; name it among fields, or as ids")
        types |= {value.dtype} if value.is_floating_point() else set()
    if len(types) > 1 or not types <= FLOATS.keys():
        shown = ", ".join(sorted(map(str, types)))
        raise DataError(f"the features are {shown}; convert all to one of {', '.join(FLOATS.values())}")
    dtype = FLOATS[types.pop()] if types else "float32"
    recipe = Recipe(FORMAT, ADOPTED, ADOPTED, ADOPTED, {"kind": ADOPTED, "about": about}, None, ADOPTED, f"raw:{dtype}")
    if (path / "recipe.json").exists():
        check(Store.open(path), recipe)
    return Store.create(path, recipe)


def _write(store: Store, found: Features, states: Sequence[str], ids: Sequence[str | int], begin: int) -> np.ndarray:
    """Write the segment of some items, unless they are there; return their keys, (n, 16) uint8."""
    tensors = {name: found.arrays[name](begin, begin + len(ids)) for name in states}
    items = zip(ids, *tensors.values(), strict=True)
    contents = [[name, dict(zip(states, map(tensor_content, values), strict=True))] for name, *values in items]
    keys = np.frombuffer(b"".join(map(content_key, contents)), np.uint8).reshape(-1, KEY_BYTES)
    lacking = np.flatnonzero(store.missing(keys)).tolist()
    if lacking:
        store.write_segment(
            keys[lacking], {f"state.{name}": [values[row] for row in lacking] for name, values in tensors.items()}
        )
    return keys
