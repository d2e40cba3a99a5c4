"""A folder per class, optionally below a folder per split: images or sounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from pipeline.data.source import Row, Source, Stamp, Target, find_split
from pipeline.errors import BadSampleError, DataError


class ClassFolder(Source):
    """Files below `root`: `<class>/**/<file>`, or `<split>/<class>/**/<file>` with splits train, validation, test.
    Where they are not `labelled`, `**/<file>`.

    Content is the bytes of the file: it is decoded by preprocessing alone, so that a key costs no decoding.
    """

    holds: ClassVar[str]
    """What the files are, in the plural."""
    extensions: ClassVar[frozenset[str]]

    def __init__(self, root: Path, *, labelled: bool = True) -> None:
        self.root = root
        self._below_root = os.path.join(root, "")  # a join for every stamp would cost as much as the stamp
        self._files: list[tuple[str, str | None, dict[str, Target]]] = (
            [
                (file, split, {"label": label})
                for split, folder in _splits(root)
                for label in _folders(folder)
                for file in self._below(folder / label)
            ]
            if labelled
            else [(file, None, {}) for file in self._below(root)]
        )
        if not self._files:
            known = " ".join(sorted(self.extensions))
            where = " in folders named after their class" if labelled else ""
            raise DataError(f"data.path {root} holds no {self.holds} ({known}){where}")

    def __len__(self) -> int:
        return len(self._files)

    def row(self, i: int) -> Row:
        return Row(*self._files[i])

    def content(self, i: int) -> bytes:
        return read_file(self.root / self._files[i][0])

    def stamp(self, i: int) -> Stamp | None:
        return stamp_file(self._below_root + self._files[i][0])

    def _below(self, folder: Path) -> list[str]:
        """Return the files below `folder`, relative to the root, in an order that is the same on every file system."""
        return sorted(
            (Path(parent) / name).relative_to(self.root).as_posix()
            for parent, _, names in os.walk(folder)
            for name in names
            if Path(name).suffix.lower() in self.extensions and not name.startswith(".")
        )


class ImageFolder(ClassFolder):
    """Images in a folder per class."""

    holds = "images"
    extensions = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class AudioFolder(ClassFolder):
    """Sounds in a folder per class."""

    holds = "sounds"
    extensions = frozenset({".aif", ".aiff", ".au", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"})


def read_file(path: Path) -> bytes:
    """Return the bytes of a sample's file.

    Raises:
        BadSampleError: it cannot be read.
    """
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


def _splits(root: Path) -> list[tuple[str | None, Path]]:
    """Tell split folders from class folders: splits there are where one is called train and all are splits."""
    splits = {name: find_split(name) for name in _folders(root)}
    found = {split for split in splits.values() if split}
    if "train" not in found or (None in splits.values() and found == {"train"}):
        return [(None, root)]
    others = sorted(name for name, split in splits.items() if split is None)
    if others:
        raise DataError(
            f"data.path {root} has split folders ({', '.join(sorted(found))}) and beside them {', '.join(others[:5])}; "
            "move these into a split, or out of the data set"
        )
    return [(split, root / name) for name, split in splits.items()]


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"data.path {folder} cannot be read: {error.strerror}") from error
