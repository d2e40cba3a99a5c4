"""A folder per class, optionally below a folder per split: images or sounds."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar

from pipeline.data.source import LeftOut, Row, Source, Stamp, Target, find_split
from pipeline.data.walk import files_below, visible
from pipeline.errors import BadSampleError, DataError

_SIGNATURE_BYTES = 16


class ClassFolder(Source):
    """Files below `root`: `<class>/**/<file>`, or `<split>/<class>/**/<file>` with splits train, validation, test.
    If they are not `labelled`, `**/<file>`. Files are recognised by their extension or their first bytes.

    Content is the bytes of the file; preprocessing decodes them.
    """

    holds: ClassVar[str]
    """What the files are, in the plural."""
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

    holds = "images"
    extensions = frozenset(
        {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm", ".png", ".pnm"}
        | {".ppm", ".tif", ".tiff", ".webp"}
    )
    # Files of raw photographs begin as TIFF does, and would give their small preview.
    signature = re.compile(rb"(?s)\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavi[fs]|BM....\0{4}")


class AudioFolder(ClassFolder):
    """Sounds in a folder per class."""

    holds = "sounds"
    extensions = frozenset(
        {".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".w64"}
        | {".wav", ".wave"}
    )
    signature = re.compile(rb"(?s)RIFF....WAVE|RF64....WAVE|FORM....AIF[FC]|fLaC|OggS|ID3|\.snd|caff")


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
