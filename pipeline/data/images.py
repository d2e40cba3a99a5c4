"""Image folders: a folder per class, optionally below a folder per split."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.source import Row, Source, Stamp, Target, find_split
from pipeline.errors import BadSampleError, ConfigError, DataError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageFolder(Source):
    """Images below `root`: `<class>/**/<image>`, or `<split>/<class>/**/<image>` with splits train, validation, test.
    Where they are not `labelled`, `**/<image>`.

    Content is the bytes of the file: an image is decoded by preprocessing alone, so that a key costs no decoding.
    """

    def __init__(self, root: Path, *, labelled: bool = True) -> None:
        self.root = root
        self._images: list[tuple[str, str | None, dict[str, Target]]] = (
            [
                (image, split, {"label": label})
                for split, folder in _splits(root)
                for label in _folders(folder)
                for image in _images(root, folder / label)
            ]
            if labelled
            else [(image, None, {}) for image in _images(root, root)]
        )
        if not self._images:
            known = " ".join(sorted(EXTENSIONS))
            where = " in folders named after their class" if labelled else ""
            raise DataError(f"data.path {root} holds no images ({known}){where}")

    def __len__(self) -> int:
        return len(self._images)

    def row(self, i: int) -> Row:
        return Row(*self._images[i])

    def content(self, i: int) -> bytes:
        image = self.root / self._images[i][0]
        try:
            return image.read_bytes()
        except OSError as error:
            raise BadSampleError(f"the file cannot be read: {error.strerror}") from error

    def stamp(self, i: int) -> Stamp | None:
        try:
            return Stamp.of(self.root / self._images[i][0])
        except OSError:
            return None


def open_images(config: DataConfig, path: Path) -> ImageFolder:
    """Open the image folder at `path`."""
    if not path.is_dir():
        needed = ", with a folder per class" if config.labelled else ""
        raise ConfigError(f"data.path is {config.path!r}, a file; source images needs a folder{needed}")
    return ImageFolder(path, labelled=config.labelled)


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


def _images(root: Path, folder: Path) -> list[str]:
    """Return the images below `folder`, relative to `root`, in an order that is the same on every file system."""
    return sorted(
        (Path(parent) / name).relative_to(root).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
    )
