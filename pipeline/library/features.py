"""Features that another program wrote: named arrays of N items, in memory or in files of four kinds.

Files come from anybody: none is unpickled, and an h5 file is not followed to others that it names.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import ConfigError, DataError

Slice: TypeAlias = "Callable[[int, int], list[Any]]"
"""Returns the values of the items from one number to before another: tensors, numbers or texts."""


@dataclass(frozen=True)
class Features:
    """N items with named values, read when they are asked for.

    Attributes:
        count: N.
        arrays: what reads the values of each name.
        names: names of the items by themselves, of a folder of files.
    """

    count: int
    arrays: Mapping[str, Slice]
    names: Sequence[str] | None = None


def open_features(source: Mapping[str, Any] | Path | str, stack: ExitStack) -> Features:
    """Open named arrays, a file .h5, .hdf5, .npz or .safetensors, or a folder of .pt; `stack` closes the file.

    Raises:
        ConfigError: nothing is there, or nothing of these kinds.
        DataError: it cannot be read, or its arrays differ in length.
    """
    if isinstance(source, Mapping):
        return _of_arrays(source)
    path = Path(source)
    kinds = {".h5": _open_h5, ".hdf5": _open_h5, ".npz": _open_npz, ".safetensors": _open_safetensors}
    if path.is_dir():
        return _open_folder(path)
    if path.suffix not in kinds or not path.is_file():
        raise ConfigError(f"source is {str(source)!r}; expected a file {', '.join(kinds)}, or a folder of .pt files")
    try:
        return kinds[path.suffix](path, stack)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it again, without pickled objects") from error


def _of_arrays(arrays: Mapping[str, Any]) -> Features:
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
        raise DataError(f"the arrays have these lengths: {shown}; give arrays with one entry per item")
    return Features(next(iter(counts.values())), {name: _slice(array) for name, array in arrays.items()})


def _slice(array: Any) -> Slice:
    def read(begin: int, end: int) -> list[Any]:
        some = array[begin:end]
        if isinstance(some, np.ndarray) and some.dtype.kind in "biuf":
            return list(torch.from_numpy(np.ascontiguousarray(some)))
        return [_plain(value) for value in some]

    return read


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _open_npz(path: Path, stack: ExitStack) -> Features:
    file = stack.enter_context(np.load(path, allow_pickle=False))
    return _of_arrays({name: file[name] for name in file.files})


def _open_safetensors(path: Path, stack: ExitStack) -> Features:
    file = stack.enter_context(safe_open(path, "pt"))
    return _of_arrays({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (it is no mapping)


def _open_h5(path: Path, stack: ExitStack) -> Features:
    try:
        import h5py  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise ConfigError(f"{path} is an h5 file, and h5py is not installed; pip install h5py") from error
    file = stack.enter_context(h5py.File(path, "r"))
    found: dict[str, Any] = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            if node.external or node.is_virtual:
                raise DataError(f"{path}: {name} has its values in another file; write them into this one")
            found[name.replace("/", ".")] = node

    file.visititems(note)  # follows no link to another file
    return _of_arrays(found)


def _open_folder(folder: Path) -> Features:
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise ConfigError(f"source is {str(folder)!r}; no file in it ends in .pt")
    first = _read_pt(files[0])

    def reader(name: str) -> Slice:
        def read(begin: int, end: int) -> list[Any]:
            items = ((file, _read_pt(file)) for file in files[begin:end])
            return [_entry(file, item, name) for file, item in items]

        return read

    return Features(len(files), {name: reader(name) for name in first}, [file.stem for file in files])


def _read_pt(file: Path) -> dict[str, Any]:
    try:
        item = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{file}: is no file of tensors alone ({str(error).splitlines()[0]}); save tensors") from error
    if isinstance(item, Tensor):
        return {"features": item}
    if not isinstance(item, dict):
        raise DataError(f"{file}: holds {type(item).__name__}; expected a tensor, or tensors by name")
    return {str(name): value for name, value in item.items()}


def _entry(file: Path, item: Mapping[str, Any], name: str) -> Any:
    if name not in item:
        raise DataError(f"{file}: has no {name!r}, as the first file has, but {', '.join(item)}; give all the same")
    return item[name]
