"""Pixels in a table: a row per image, a column per pixel (CSV)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.data.config import DataConfig
from pipeline.data.delimited import is_number, read_labels
from pipeline.data.source import Row, Source, Target, is_missing
from pipeline.errors import ConfigError, DataError, first_few

CHANNELS = (1, 3)


class Pixels(Source):
    """Images of one size, held in memory: `images` (N, H, W) or (N, H, W, C), `labels` one per image, if any."""

    def __init__(self, name: str, images: np.ndarray, labels: list[Target] | None) -> None:
        self.name, self._images, self._labels = name, images, labels

    def __len__(self) -> int:
        return len(self._images)

    def row(self, i: int) -> Row:
        return Row(f"{self.name}#{i}", None, {} if self._labels is None else {"label": self._labels[i]})

    def content(self, i: int) -> np.ndarray:
        image: np.ndarray = self._images[i]
        return image


def open_pixels(config: DataConfig, path: Path) -> Pixels:
    """Read the table (.csv, .csv.gz) at `path`."""
    if path.suffix in (".npy", ".npz"):
        raise ConfigError(f"data.path is {path}, an array; source pixels reads tables; set data.source: arrays")
    header = _has_header(path) if config.header is None else config.header
    table, column = _read(config, path, header=header)
    pixels = table if column is None else table.remove_column(column)
    for name, values in zip(pixels.column_names, pixels.columns, strict=True):
        _check_bytes(path, name, values)
    flat = np.empty((table.num_rows, pixels.num_columns), np.uint8)
    for i, values in enumerate(pixels.columns):
        flat[:, i] = values.to_numpy()
    shape = config.shape or _square(pixels.num_columns)
    if shape is None:
        raise ConfigError(f"{path} has {pixels.num_columns} pixels a row, which is no square image; set data.shape")
    if math.prod(shape) != pixels.num_columns:
        raise ConfigError(f"data.shape is {list(shape)}, {math.prod(shape)} pixels; {path} has {pixels.num_columns}")
    images = flat.reshape(-1, *shape)
    if column is None or not config.labelled:
        return Pixels(path.name, images, None)
    labels = read_labels([table.column(column)])[0].to_pylist()
    if missing := [f"{path.name}#{row}" for row, label in enumerate(labels) if is_missing(label)]:
        raise DataError(f"{path}: {len(missing)} rows have no label (column {column}; {first_few(missing)})")
    return Pixels(path.name, images, labels)


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


def _check_bytes(path: Path, name: str, values: pa.ChunkedArray) -> None:
    remedy = "pixels of a table are whole numbers in 0..255; source arrays holds other ranges"
    if not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(f"{path}: column {name} holds {values.type}, {values.null_count} of them empty; {remedy}")
    bounds = pc.min_max(values).as_py()
    if bounds["min"] is not None and (bounds["min"] < 0 or bounds["max"] > 255):
        raise DataError(f"{path}: column {name} holds {bounds['min']}..{bounds['max']}; {remedy}")


def _square(pixels: int) -> tuple[int, ...] | None:
    """Return the shape of a square image, grey or RGB, of so many pixels, if there is one."""
    for channels in CHANNELS:
        side = math.isqrt(pixels // channels)
        if side * side * channels == pixels:
            return (side, side) if channels == 1 else (side, side, channels)
    return None
