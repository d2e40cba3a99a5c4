"""Images and sounds: files in a folder per class, or files that a table names or holds."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.config import DataConfig
from pipeline.data.folders import AudioFolder, ClassFolder, ImageFolder, read_file, stamp_file
from pipeline.data.labelled import Labelled, label_fields
from pipeline.data.records import Records, read_records
from pipeline.data.saved import is_saved
from pipeline.data.source import Source, Stamp
from pipeline.errors import BadSampleError, ConfigError, DataError


class MediaTable(Labelled):
    """A file and a label per record of a table. A cell of `setting` has a path below the folder `root`, or the bytes;
    of {bytes, path}, as Hugging Face saves it, the bytes come first.
    """

    def __init__(self, name: str, records: Records, setting: str, root: Path, delimiter: str | None) -> None:
        super().__init__(name, records, delimiter)
        self.root, self._files, self._setting = root, records.columns[setting], setting
        self._paths = _paths(self._files, setting)
        for i, path in enumerate(self._paths.to_pylist()):
            if path is not None and not _is_below(path):
                raise DataError(f"{records.where(i)}: {setting} is {path!r}; expected one relative to {root}, below it")

    def content(self, i: int) -> bytes:
        cell = self._files[i].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return data
        if not (path := self._paths[i].as_py()):
            raise BadSampleError(self._records.fault(self._setting, i) or "the field of the file is empty")
        return read_file(self.root / path)

    def stamp(self, i: int) -> Stamp | None:
        path = self._paths[i].as_py()
        return stamp_file(self.root / path) if path else None


def open_images(config: DataConfig, path: Path) -> Source:
    """Open the folder of images at `path`, or the table that names or holds them."""
    return _open(config, path, "image", ImageFolder)


def open_audio(config: DataConfig, path: Path) -> Source:
    """Open the folder of sounds at `path`, or the table that names or holds them."""
    return _open(config, path, "audio", AudioFolder)


def _open(config: DataConfig, path: Path, setting: str, folder: type[ClassFolder]) -> Source:
    if path.is_dir() and not is_saved(path):
        of_tables = (setting, "label", "split", "group", "records", "delimiter")
        unused = [name for name in of_tables if getattr(config, name) is not None]
        if unused and config.labelled:
            raise ConfigError(
                f"data.{unused[0]} is {getattr(config, unused[0])!r}, which is for tables; data.path {path} is a "
                "folder of classes; remove it"
            )
        return folder(path, labelled=config.labelled)
    needed = (setting, "label") if config.labelled else (setting,)
    if missing := [name for name in needed if getattr(config, name) is None]:
        remedy = "name the field, or give a folder of classes"
        raise ConfigError(f"data.{missing[0]} is not set; data.path {path} is a table; {remedy}")
    named = {setting: getattr(config, setting)} | label_fields(config)
    records = read_records(path, named, records=config.records, labels_as_text=config.delimiter is not None)
    root = path if path.is_dir() else path.parent
    return MediaTable(path.name, records, setting, root, config.delimiter)


def _paths(files: pa.ChunkedArray, setting: str) -> pa.ChunkedArray:
    """Return the path that is read for each record; null where the table holds the bytes, or nothing."""
    kind = files.type
    members = {field.name for field in kind} if pa.types.is_struct(kind) else set[str]()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return files
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or ("bytes" in members and "path" not in members):
        return pa.nulls(len(files))
    if "path" not in members:
        raise ConfigError(f"data.{setting}: the field holds {kind}; expected paths, bytes, or both")
    paths = pc.struct_field(files, "path")
    return pc.if_else(pc.is_valid(pc.struct_field(files, "bytes")), None, paths) if "bytes" in members else paths


def _is_below(path: str) -> bool:
    """Return whether a relative path from a table stays below its folder, on any operating system."""
    windows = PureWindowsPath(path)
    return not (PurePosixPath(path).is_absolute() or windows.anchor or ".." in windows.parts or "\0" in path)
