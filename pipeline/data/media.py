"""Images and sounds: files in a folder per class, or files that a table names or holds."""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.config import DataConfig
from pipeline.data.labelled import Labelled
from pipeline.data.records import is_saved
from pipeline.data.source import LeftOut, Row, Source, Stamp, Target, find_split
from pipeline.data.walk import files_below, visible
from pipeline.errors import BadSampleError, ConfigError, DataError

_SIGNATURE_BYTES = 16


class ClassFolder(Source):
    """Files below `root`: `<class>/**/<file>`, or `<split>/<class>/**/<file>` with splits train, validation, test.
    If they are not `labelled`, `**/<file>`. Files are recognised by their extension or their first bytes.

    Content is the bytes of the file; preprocessing decodes them.
    """

    holds: ClassVar[str]
    """What the files are, in the plural."""
    setting: ClassVar[str]
    """The setting with the field of a table that names or holds such files."""
    extensions: ClassVar[frozenset[str]]
    signature: ClassVar[re.Pattern[bytes]]
    """How the contents of files begin whose extension says nothing."""

    def __init__(self, root: Path, *, labelled: bool = True) -> None:
        self.root = root
        self._below_root = os.path.join(root, "")  # a join for every stamp would cost as much as the stamp
        self._left_out = LeftOut()
        self._files: list[tuple[str, str | None, dict[str, Target]]] = []
        for split, folder in _splits(root, self._left_out) if labelled else []:
            for label in _folders(folder, root, self._left_out, "outside of the class folders"):
                self._files += [(file, split, {"label": label}) for file in self._below(folder / label)]
        if not labelled:
            self._files = [(file, None, {}) for file in self._below(root)]
        if not self._files:
            where = " in folders named after their class" if labelled else ""
            others = f"; left out: {self._left_out}" if self._left_out else ""
            raise DataError(
                f"data.path {root} holds no {self.holds} ({' '.join(sorted(self.extensions))}){where}{others}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def row(self, i: int) -> Row:
        return Row(*self._files[i])

    def content(self, i: int) -> bytes:
        return read_file(self.root / self._files[i][0])

    def stamp(self, i: int) -> Stamp | None:
        return stamp_file(self._below_root + self._files[i][0])

    def _below(self, folder: Path) -> list[str]:
        files = files_below(folder, self.root, self._is_one, self._left_out)
        if not files and folder != self.root:
            self._left_out.add(f"class folders without {self.holds}", folder.relative_to(self.root).as_posix())
        return files

    def _is_one(self, path: str) -> bool:
        if os.path.splitext(path)[1].lower() in self.extensions:
            return True
        try:
            with open(path, "rb") as file:
                return self.signature.match(file.read(_SIGNATURE_BYTES)) is not None
        except OSError:
            return False


class ImageFolder(ClassFolder):
    """Images in a folder per class."""

    holds, setting = "images", "image"
    extensions = frozenset(
        {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm", ".png", ".pnm"}
        | {".ppm", ".tif", ".tiff", ".webp"}
    )
    # Files of raw photographs begin as TIFF does, and would give their small preview.
    signature = re.compile(rb"(?s)\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavi[fs]|BM....\0{4}")


class AudioFolder(ClassFolder):
    """Sounds in a folder per class."""

    holds, setting = "sounds", "audio"
    extensions = frozenset(
        {".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".w64"}
        | {".wav", ".wave"}
    )
    signature = re.compile(rb"(?s)RIFF....WAVE|RF64....WAVE|FORM....AIF[FC]|fLaC|OggS|ID3|\.snd|caff")


class MediaTable(Labelled):
    """A file and a label per record of a table. A cell of `setting` has a path below the folder `root`, or the bytes;
    of {bytes, path}, as Hugging Face saves it, the bytes come first.
    """

    def __init__(self, config: DataConfig, path: Path, setting: str) -> None:
        super().__init__(config, path, setting)
        self.root = root = path if path.is_dir() else path.parent
        self._files, self._setting = self._records.columns[setting], setting
        self._paths = _paths(self._files, setting)
        for i, file in enumerate(self._paths.to_pylist()):
            if file is not None and not _is_below(file):
                raise DataError(
                    f"{self._records.where(i)}: {setting} is {file!r}; expected one relative to {root}, below it"
                )

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


def open_media(config: DataConfig, path: Path) -> Source:
    """Open the folder of images or sounds at `path`, or the table that names or holds them."""
    folder = ImageFolder if config.source == "images" else AudioFolder
    setting = folder.setting
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
    return MediaTable(config, path, setting)


def read_file(path: Path) -> bytes:
    """Return the bytes of a sample's file; raises BadSampleError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"the file cannot be read: {error.strerror}") from error


def stamp_file(path: Path | str) -> Stamp | None:
    """Return the stamp of a sample's file; None where it cannot be seen."""
    try:
        return Stamp.of(path)
    except OSError:
        return None


def _splits(root: Path, left_out: LeftOut) -> list[tuple[str | None, Path]]:
    """Return split folders, if one is called train and all are splits; else `root` as a folder of classes."""
    splits = {name: find_split(name) for name in _folders(root, root, LeftOut(), "")}
    found = {split for split in splits.values() if split}
    if "train" not in found or (None in splits.values() and found == {"train"}):
        return [(None, root)]
    others = sorted(name for name, split in splits.items() if split is None)
    if others:
        raise DataError(
            f"data.path {root} has split folders ({', '.join(sorted(found))}) and beside them {', '.join(others[:5])}; "
            "move these into a split, or out of the data set"
        )
    _folders(root, root, left_out, "outside of the split folders")
    return [(split, root / name) for name, split in splits.items()]


def _folders(folder: Path, root: Path, left_out: LeftOut, kind: str) -> list[str]:
    """Return the names of the folders in `folder`; files beside them are counted as of `kind`."""
    names = []
    for entry in visible(folder, root, left_out):
        if entry.is_dir():
            names.append(entry.name)
        else:
            left_out.add(kind, Path(entry).relative_to(root).as_posix())
    return names


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
