"""Numbers of any shape in NumPy's files, .npy (memory-mapped) or .npz; pixels in a table, a row per image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.data.config import DataConfig
from pipeline.data.formats import is_number, read_labels
from pipeline.data.source import Row, Source, is_missing, split_named
from pipeline.errors import ConfigError, DataError, first_few

NUMBERS = "uifb"
CHANNELS = (1, 3)


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


def open_pixels(config: DataConfig, path: Path) -> Arrays:
    """Read the table (.csv, .csv.gz) at `path`."""
    if path.suffix in (".npy", ".npz"):
        raise ConfigError(f"data.path is {path}, an array; source pixels reads tables; set data.source: arrays")
    header = _has_header(path) if config.header is None else config.header
    table, column = _read(config, path, header=header)
    pixels = table if column is None else table.remove_column(column)
    for name, values in zip(pixels.column_names, pixels.columns, strict=True):
        remedy = "pixels of a table are whole numbers in 0..255; source arrays holds other ranges"
        if not pa.types.is_integer(values.type) or values.null_count:
            raise DataError(f"{path}: column {name} holds {values.type}, {values.null_count} of them empty; {remedy}")
        bounds = pc.min_max(values).as_py()
        if bounds["min"] is not None and (bounds["min"] < 0 or bounds["max"] > 255):
            raise DataError(f"{path}: column {name} holds {bounds['min']}..{bounds['max']}; {remedy}")
    shape = config.shape or _square(pixels.num_columns)
    if shape is None:
        raise ConfigError(f"{path} has {pixels.num_columns} pixels a row, which is no square image; set data.shape")
    if math.prod(shape) != pixels.num_columns:
        raise ConfigError(f"data.shape is {list(shape)}, {math.prod(shape)} pixels; {path} has {pixels.num_columns}")
    flat = np.empty((table.num_rows, pixels.num_columns), np.uint8)
    for i, values in enumerate(pixels.columns):
        flat[:, i] = np.from_dlpack(values.combine_chunks())  # `to_numpy` imports pandas
    images = flat.reshape(-1, *shape)
    if column is None or not config.labelled:
        return Arrays(path, images, None)
    labels = read_labels([table.column(column)])[0].to_pylist()
    if missing := [f"{path.name}#{row}" for row, label in enumerate(labels) if is_missing(label)]:
        raise DataError(f"{path}: {len(missing)} rows have no label (column {column}; {first_few(missing)})")
    return Arrays(path, images, np.array(labels))


def _read(config: DataConfig, path: Path, *, header: bool) -> tuple[pa.Table, int | None]:
    """Return the table, and the number of the column of labels, which is read as text."""
    options = pa.csv.ReadOptions(autogenerate_column_names=not header)
    try:
        with pa.csv.open_csv(path, read_options=options) as beginning:
            names = beginning.schema.names
        column = _label_column(config, names, named=header)
        texts = [] if column is None else [names[column]]
        convert = pa.csv.ConvertOptions(strings_can_be_null=False, column_types=dict.fromkeys(texts, pa.string()))
        return pa.csv.read_csv(path, read_options=options, convert_options=convert), column
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"data.path {path} cannot be read as CSV: {error}") from error


def _has_header(path: Path) -> bool:
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            first = stream.read(1 << 20).split(b"\n", 1)[0].decode("utf-8", errors="replace")
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"data.path {path} cannot be read: {error}") from error
    return not any(is_number(field.strip().strip('"')) for field in first.split(","))


def _label_column(config: DataConfig, names: list[str], *, named: bool) -> int | None:
    """Return the number of the labels' column; None where none are wanted and all columns are pixels."""
    label = config.label if isinstance(config.label, str | int) else -1
    if not config.labelled:
        pixels = _square(len(names)) if config.shape is None else config.shape
        absent = label not in names if isinstance(label, str) else math.prod(pixels or ()) == len(names)
        if absent:
            return None
    if isinstance(label, str):
        if not named or label not in names:
            shown = ", ".join(names if len(names) <= 12 else [*names[:6], "...", *names[-5:]])
            known = f"the columns {shown}" if named else f"{len(names)} columns without names; give its number"
            raise ConfigError(f"data.label is {label!r}; {config.path} has {known}")
        return names.index(label)
    if not -len(names) <= label < len(names):
        raise ConfigError(f"data.label is {label}; {config.path} has {len(names)} columns")
    return label % len(names)


def _square(pixels: int) -> tuple[int, ...] | None:
    """Return the shape of a square image, grey or RGB, of so many pixels, if there is one."""
    for channels in CHANNELS:
        side = math.isqrt(pixels // channels)
        if side * side * channels == pixels:
            return (side, side) if channels == 1 else (side, side, channels)
    return None
