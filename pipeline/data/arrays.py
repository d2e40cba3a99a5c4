"""Numbers of any shape in NumPy's files: .npy, which is memory-mapped, and .npz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.config import DataConfig
from pipeline.data.source import Row, Source, split_named
from pipeline.errors import ConfigError, DataError

NUMBERS = "uifb"


@dataclass
class Arrays(Source):
    """Arrays of one shape: `samples` (N, ...), with labels, splits and groups where they are known, each (N,).

    Labels (N, K) are a list for each sample: K numbers, or of booleans the numbers of the columns that are true.
    """

    path: Path
    samples: np.ndarray
    labels: np.ndarray | None
    splits: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, i: int) -> Row:
        where = f"{self.path.name}#{i}"
        targets: dict[str, Any] = {}
        if self.labels is not None:
            label = self.labels[i]
            targets["label"] = np.flatnonzero(label).tolist() if label.ndim and label.dtype == bool else label.tolist()
        if self.groups is not None:
            targets["group"] = str(self.groups[i])
        return Row(where, None if self.splits is None else split_named(self.splits[i], where), targets)

    def content(self, i: int) -> np.ndarray:
        return np.asarray(self.samples[i])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path only: a copy maps the file again, which may be larger than memory."""
        mapped = isinstance(self.samples, np.memmap)
        return self.__dict__ | {"samples": None} if mapped else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["samples"] is None:
            self.samples = _load(self.path)


def open_arrays(config: DataConfig, path: Path) -> Arrays:
    """Open the arrays at `path`; pickled objects are refused."""
    if path.suffix == ".npz":
        return _from_npz(config, path)
    if path.suffix == ".npy":
        return _from_npy(config, path)
    raise ConfigError(f"data.path is {path}; expected .npy or .npz (source pixels reads tables)")


def _from_npy(config: DataConfig, path: Path) -> Arrays:
    """Read labels, splits and groups from the files beside that of the samples."""

    def beside(setting: str, name: str) -> np.ndarray:
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise ConfigError(f"data.{setting}: {path} holds samples alone; {name} is missing beside it; name its .npy")
        return np.asarray(_load(file))

    return _checked(config, path, _load(path), beside, label=f"{path.stem}.labels.npy")


def _from_npz(config: DataConfig, path: Path) -> Arrays:
    """Read labels, splits and groups by name; the remaining array has the samples."""
    arrays = _load(path)
    label = config.label if isinstance(config.label, str) else "y"
    named = {"label": label, "split": config.split, "group": config.group}
    others = sorted(set(arrays) - set(named.values()))
    for setting, name in named.items():
        if name is not None and ((name not in arrays and config.labelled) or len(others) != 1):
            raise ConfigError(
                f"data.{setting} is {name!r}; {path} holds {', '.join(sorted(arrays))}; expected what is named and "
                "one more array, with the samples"
            )
    return _checked(config, path, arrays[others[0]], lambda _, name: arrays[name], label=label)


def _checked(
    config: DataConfig, path: Path, samples: np.ndarray, read: Callable[[str, str], np.ndarray], label: str
) -> Arrays:
    if not config.labelled:
        if samples.ndim < 2 or samples.dtype.kind not in NUMBERS:
            raise DataError(f"{path}: samples {samples.dtype} of shape {samples.shape}; expected numbers (N, ...)")
        return Arrays(path, samples, None)
    labels = read("label", config.label if isinstance(config.label, str) else label)
    if samples.ndim < 2 or labels.ndim not in (1, 2) or len(labels) != len(samples):
        raise DataError(f"{path}: samples {samples.shape}, labels {labels.shape}; expected (N, ...), (N,) or (N, K)")
    if samples.dtype.kind not in NUMBERS or labels.dtype.kind not in f"{NUMBERS}U":
        raise DataError(f"{path}: samples {samples.dtype}, labels {labels.dtype}; expected numbers, numbers or text")
    more = {setting: name for setting in ("split", "group") if (name := getattr(config, setting)) is not None}
    columns = {setting: read(setting, name) for setting, name in more.items()}
    for setting, column in columns.items():
        if column.shape != (len(samples),):
            raise DataError(f"{path}: data.{setting} has shape {column.shape}; expected ({len(samples)},)")
    return Arrays(path, samples, labels, columns.get("split"), columns.get("group"))


def _load(path: Path) -> Any:
    """Return the array of a .npy, memory-mapped, or those of a .npz by name."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {error}") from error
