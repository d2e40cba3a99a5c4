"""Data sets that Hugging Face datasets wrote by `save_to_disk`: Arrow streams and a list of their files.

They are memory-mapped by pyarrow, without the data set's code, cache or pickles. The metadata of that library's tables,
in Parquet too, has the names of class numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from pipeline.data.source import split_named
from pipeline.errors import DataError

STATE, SPLITS = "state.json", "dataset_dict.json"
_FEATURES = b"huggingface"


def is_saved(path: Path) -> bool:
    """Say whether `path` is a folder that `save_to_disk` wrote, of one data set or of a dictionary of splits."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def read_saved(path: Path) -> list[tuple[Path, str | None, pa.Table]]:
    """Return folder, split and table of each part of the data set at `path`; one without splits is one part.

    Raises:
        DataError: a file is missing or damaged, or names one outside the folder, or a split is called unusually.
    """
    if not (path / SPLITS).is_file():
        return [(path, None, _read_one(path))]
    names = [_plain(name, path / SPLITS) for name in _read_json(path / SPLITS, "splits")]
    return [(path / name, split_named(name, str(path)), _read_one(path / name)) for name in names]


def with_class_names(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return the column `name`, with the class numbers that the table's metadata name replaced by names, -1 by null.

    Raises:
        DataError: a number has no name.
    """
    if (names := _class_names(table, name)) is None:
        return table.column(name)
    flat = table.column(name).combine_chunks()
    numbers = flat.flatten() if pa.types.is_list(flat.type) else flat
    try:
        numbers = numbers.cast(pa.int64())
        numbers = pa.compute.if_else(pa.compute.equal(numbers, -1), None, numbers)
        labels = pa.array(names, pa.string()).take(numbers)
    except pa.ArrowException as error:
        raise DataError(f"field {name} has a class number beyond its {len(names)} names ({error})") from error
    if not pa.types.is_list(flat.type):
        return pa.chunked_array([labels])
    first = pa.compute.min(flat.offsets)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.compute.subtract(flat.offsets, first), labels)])


def _read_one(folder: Path) -> pa.Table:
    tables = []
    for item in _read_json(folder / STATE, "_data_files"):
        file = folder / _plain(item.get("filename") if isinstance(item, dict) else item, folder / STATE)
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read as an Arrow stream ({error}); save the data set again") from error
    if not tables:
        raise DataError(f"data.path {folder} holds no records")
    return pa.concat_tables(tables)


def _read_json(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); save the data set again") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: {key} is {found!r}; expected a list; save the data set again")
    return found


def _plain(name: object, where: Path) -> str:
    """Return a name that stays in its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
        raise DataError(f"{where} names {name!r}; expected a name in the same folder")
    return name


def _class_names(table: pa.Table, name: str) -> Sequence[str] | None:
    try:
        features = json.loads((table.schema.metadata or {})[_FEATURES])["info"]["features"]
        feature = features[name]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(feature, list) and len(feature) == 1:  # how a list was written before it had a type
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    found: Sequence[str] | None = feature.get("names") if isinstance(feature, dict) else None
    return found
