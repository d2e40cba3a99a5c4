"""Data sets of torchvision, by name."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.config import DataConfig
from pipeline.data.source import Row, Source, find_split
from pipeline.errors import BadSampleError, ConfigError, DataError

SPLIT_ARGUMENTS: Mapping[str, Mapping[Any, str]] = {
    "train": {True: "train", False: "test"},
    "split": {name: name for name in ("train", "trainval", "val", "valid", "test")},
    "image_set": {name: name for name in ("train", "val", "test")},
}
"""Arguments by which data sets choose a part -> their values that are tried, and the split each one is."""
PLAIN_MODES = ("L", "RGB")
DRAWN_MODES = ("1", "P", "PA", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Modes of PIL that are made RGB without loss of range; 16-bit and float images are not among them."""


class Torchvision(Source):
    """The splits of a data set of torchvision, one after the other; content is the image's pixels."""

    def __init__(self, name: str, parts: Sequence[tuple[str | None, Any]]) -> None:
        self.name, self._parts = name, parts
        self._places = [(number, i) for number, (_, part) in enumerate(parts) for i in range(len(part))]
        self._known: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def row(self, i: int) -> Row:
        number, place = self._places[i]
        split = self._parts[number][0]
        where = f"{self.name}{'' if split is None else '/' + split}#{place}"
        return Row(where, split, {"label": self._label(i, where)})

    def content(self, i: int) -> np.ndarray:
        number, place = self._places[i]
        try:
            image = self._parts[number][1][place][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadSampleError(f"the image cannot be read: {error}") from error
        if isinstance(image, Image.Image):
            if image.mode not in (*PLAIN_MODES, *DRAWN_MODES):
                raise BadSampleError(f"the image has the mode {image.mode}; expected one that RGB can show")
            image = image if image.mode in PLAIN_MODES else image.convert("RGB")
        elif not isinstance(image, np.ndarray):
            raise BadSampleError(f"the sample is {type(image).__name__}; expected an image or an array")
        return np.asarray(image)

    def _label(self, i: int, where: str) -> str | int:
        """Return the class name, else the number; each sample is read once if the data set lists no targets."""
        if i not in self._known:
            number, place = self._places[i]
            part = self._parts[number][1]
            listed = getattr(part, "targets", None)
            self._known[i] = part[place][1] if listed is None else listed[place]
        label = self._known[i]
        if not isinstance(label, int | np.integer) and not (hasattr(label, "ndim") and label.ndim == 0):
            raise DataError(
                f"{where}: the target is {type(label).__name__}; expected the number of a class; choose another "
                'data.options, or write a source of your own ("module:function")'
            )
        names = getattr(self._parts[self._places[i][0]][1], "classes", None)
        known = names[int(label)] if isinstance(names, list | tuple) and 0 <= int(label) < len(names) else None
        return known if isinstance(known, str) else int(label)


def open_torchvision(config: DataConfig, path: Path) -> Torchvision:
    """Open the data set `config.name` below `path`, every split it has."""
    import torchvision.datasets as known  # noqa: PLC0415  (slow to import)

    name = str(config.name)
    kind = getattr(known, name, None) if name in known.__all__ else None
    if not inspect.isclass(kind) or not issubclass(kind, known.VisionDataset):
        near = ", ".join(get_close_matches(name, known.__all__, n=5)) or ", ".join(known.__all__)
        raise ConfigError(f"data.name is {name!r}; torchvision.datasets has no such data set (near: {near})")
    accepted = _arguments(kind)
    arguments = dict(config.options)
    if "root" in accepted:
        arguments["root"] = path
    if "download" in accepted:
        arguments["download"] = bool(config.download)
    elif config.download:
        raise ConfigError(f"data.download is true; torchvision cannot fetch {name}; fetch it by hand into {path}")
    chooser = next((one for one in SPLIT_ARGUMENTS if one in accepted and one not in config.options), None)
    if chooser is None:
        return Torchvision(name, [(None, _make(kind, arguments, path))])
    parts: list[tuple[str | None, Any]] = []
    for value, split in SPLIT_ARGUMENTS[chooser].items():
        if split == "trainval" and parts:
            continue  # it is the training split, where that is not a part of it
        if (part := _make(kind, arguments | {chooser: value}, path, chooser)) is not None:
            parts.append(("train" if split == "trainval" else find_split(split), part))
    if not parts:
        raise ConfigError(f"data.options does not set {chooser}, whose values {name} names differently; set it")
    return Torchvision(name, parts)


def _arguments(kind: type) -> set[str]:
    """Return the names of the constructor's arguments, with those of its base class if it has `**kwargs`."""
    names: set[str] = set()
    for constructor in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(constructor).parameters
        names |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _make(kind: type, arguments: dict[str, Any], path: Path, chooser: str | None = None) -> Any:
    """Return the data set; None if it does not know this value of the argument `chooser`."""
    try:
        return kind(**arguments)
    except ValueError as error:
        if chooser is not None and f"argument {chooser}" in str(error):
            return None
        raise ConfigError(f"data.options is {arguments}; {kind.__name__} does not take it: {error}") from error
    except TypeError as error:
        raise ConfigError(f"data.options: {kind.__name__} does not take it: {error}") from error
    except (OSError, RuntimeError, ImportError) as error:
        shown = "" if chooser is None else f", {chooser} {arguments[chooser]!r},"
        raise DataError(
            f"{kind.__name__}{shown} cannot be opened below data.path {path}: {error}; set data.download: true, or "
            "fetch it by hand"
        ) from error
