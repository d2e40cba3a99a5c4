"""States without a network: for probing, clustering and models of one's own; and files of them for other programs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data import SampleTable, write_table
from pipeline.errors import ConfigError, DataError
from pipeline.files import whole
from pipeline.library.fields import Column, join_columns
from pipeline.library.store import StateStore, open_reader
from pipeline.library.table import ItemTable, find_split, splits_of
from pipeline.split.inputs import ExampleInputs
from pipeline.store import Store

BLOCK = 1024
"""Items that are read at a time."""
SHAPE = ".shape"
"""Ends the name of the shapes, (N, axes), of a tensor whose items differ in shape: its values are one axis then."""


def open_states(path: Path | str, split: str | None = None, samples: Path | str | None = None) -> StateStore:
    """Open the states of a store without the network that made them: whose they are is not proved.

    Args:
        path: the folder of a store, also of a project (data/activations/0.5).
        split: name of a data set in it, where there are several.
        samples: a project's sample table (data/samples.parquet): its samples and targets, in its order.

    Raises:
        StoreError: no store is there, or no such split.
        MissingKeysError: some samples of the table are not in the store; the message names up to five.
    """
    store = Store.open(Path(path))
    if samples is None and splits_of(store.path):
        return StateStore.open(store, find_split(store.path, split), ExampleInputs())
    if samples is None:
        keys = store.keys()
        table = ItemTable(keys, np.arange(len(keys)), {})
    else:
        known = SampleTable.read(Path(samples))
        named = {"split": known.split, "source": np.array(known.source, object), **known.targets}
        columns = {name: Column.of(values.tolist()) for name, values in named.items()}
        table = ItemTable(known.keys, np.arange(len(known)), columns)
    return StateStore(store.path, table, store.rows(table.keys), partial(open_reader, store), ExampleInputs())


def export_states(states: StateStore, out: Path, form: str | None = None) -> None:
    """Write the keys, the states and the fields of `states` to one file: Parquet block by block, others at once.

    A tensor is called `state.NAME`; one whose items differ in shape has all their values on one axis, and their shapes
    in `state.NAME.shape`. Stored values are written as they are; bfloat16 as float32, except to safetensors.

    Args:
        states: what `open_states`, `open_store` or `encode` returned.
        out: the file; it is replaced as a whole.
        form: "parquet", "npz", "h5" or "safetensors"; None takes the ending of `out`.

    Raises:
        ConfigError: the format is none of these, or its library is not installed.
        DataError: a field cannot be written in this format.
    """
    form = form or out.suffix.removeprefix(".")
    if form not in WRITERS:
        raise ConfigError(f"the format is {form!r}; expected one of {', '.join(WRITERS)}")
    with whole(out) as beside:
        WRITERS[form](beside, states)


def columns(states: StateStore, rows: Sequence[int] | None = None) -> dict[str, Column]:
    """Return the states and fields of some rows, or of all, as columns: `state.NAME`, other inputs, fields, `key`."""
    data = states.dataset(rows)
    items = [data[i] for i in range(len(data))]
    flat = [{**_flat(item.pop("state")), **item} for item in items]
    named = {name: Column.of([item[name] for item in flat]) for name in (flat[0] if flat else ())}
    return {"key": Column(torch.from_numpy(states.table.keys[data.rows])), **named}


def _flat(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {f"state.{name}": tensor for name, tensor in state.items()}


def _blocks(states: StateStore) -> Iterator[dict[str, Column]]:
    for begin in range(0, len(states), BLOCK):
        yield columns(states, range(begin, min(begin + BLOCK, len(states))))


def _arrays(found: dict[str, Column], convert: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Return columns as arrays: of unequal tensors the values and the shapes, of texts an array of texts."""
    arrays: dict[str, Any] = {}
    for name, column in found.items():
        if isinstance(column.values, Tensor):
            arrays[name] = convert(column.values)
            if column.shapes is not None:
                arrays[f"{name}{SHAPE}"] = convert(column.shapes)
        elif all(isinstance(value, str) for value in column.values):
            arrays[name] = np.array(column.values, np.str_)
        else:
            raise DataError(f"the field {name!r} holds neither tensors, numbers nor texts; export it as parquet")
    return arrays


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; bfloat16, which NumPy lacks, as float32."""
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array


def _write_npz(out: Path, states: StateStore) -> None:
    with out.open("wb") as file:
        np.savez(file, allow_pickle=False, **_arrays(join_columns(list(_blocks(states))), as_numpy))


def _write_safetensors(out: Path, states: StateStore) -> None:
    def kept(tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    arrays = _arrays(join_columns(list(_blocks(states))), kept)
    if texts := [name for name, value in arrays.items() if not isinstance(value, Tensor)]:
        raise DataError(f"safetensors holds no texts, as the field {texts[0]!r} has; export as parquet, npz or h5")
    save_file(arrays, out)


def _write_h5(out: Path, states: StateStore) -> None:
    try:
        import h5py  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise ConfigError(
            "the format is h5, and h5py is not installed: pip install 'layer-recycling[library]'"
        ) from error
    with h5py.File(out, "w") as file:
        for name, array in _arrays(join_columns(list(_blocks(states))), as_numpy).items():
            file[name] = array.astype(h5py.string_dtype()) if array.dtype.kind == "U" else array


def _write_parquet(out: Path, states: StateStore) -> None:
    write_table(out, map(_lists, _blocks(states)))


def _lists(block: dict[str, Column]) -> dict[str, list[Any]]:
    """Return columns as lists of values, bytes and flat lists; with the shapes of tensors of several axes."""
    found: dict[str, list[Any]] = {"key": [bytes(key.tolist()) for key in block.pop("key")]}
    for name, column in block.items():
        if not isinstance(column.values, Tensor) or column.axes == 0:
            found[name] = [value.item() if isinstance(value, Tensor) else value for value in column]
            continue
        found[name] = [as_numpy(value).reshape(-1) for value in column]
        if column.axes != 1:
            found[f"{name}{SHAPE}"] = [list(value.shape) for value in column]
    return found


WRITERS: dict[str, Callable[[Path, StateStore], None]] = {
    "parquet": _write_parquet,
    "npz": _write_npz,
    "h5": _write_h5,
    "safetensors": _write_safetensors,
}
