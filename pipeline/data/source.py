"""The interface of a data source: rows with targets, and the content of each row on demand; and a view of another."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from pipeline.errors import DataError
from pipeline.files import load_function
from pipeline.keys import content_key

Content = bytes | np.ndarray | str | tuple[str, str] | list[str] | dict[str, Any]
"""One sample as its source holds it: an encoded image, an array (pixels), a text, a text and its partner, words, or a
chat (`messages`, and others that its template takes)."""

Scalar = str | int | float
Target = Scalar | list[str] | list[int] | list[float]
"""A target: a value, or a list of them (a tag per word, several labels)."""

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}


class Row(NamedTuple):
    """The name, the split and the targets of a sample, known without reading its content."""

    source: str
    """Name of the sample for people: a path below the data set, or file and row number."""
    split: str | None
    """One of `SPLITS`, or None where the data set leaves the choice to the held-out rule of the sample table."""
    targets: Mapping[str, Target]
    """Columns of the sample table (`label`, or `pair` and `role`, ...): all rows have the same; values or lists."""


SETTLED_NS = 2_000_000_000
"""Resolution of the coarsest file-system clock (FAT): a younger file may change without a new mtime."""


class Stamp(NamedTuple):
    """Identity of a file (path, size, mtime, inode), known without reading it."""

    path: str
    size: int
    """Bytes."""
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | str) -> Self:
        """Return the stamp of the file at `path`; raises OSError if there is none."""
        stat = os.stat(path)
        return cls(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def settled(self, now_ns: int) -> bool:
        """Return whether the file, seen at `now_ns`, cannot change without a new stamp."""
        return self.mtime_ns < now_ns - SETTLED_NS


def is_missing(value: object) -> bool:
    """Return whether a value is missing: None, a blank text, or NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


class LeftOut(dict[str, tuple[int, str]]):
    """Files and records that are not samples: the count of each kind, and the first one."""

    def add(self, kind: str, where: str) -> None:
        """Count one more of a kind."""
        count, first = self.get(kind, (0, where))
        self[kind] = (count + 1, first)

    def __str__(self) -> str:
        shown = ", ".join(f"{count} {kind} (first: {first})" for kind, (count, first) in self.items())
        return shown.encode("utf-8", "backslashreplace").decode()  # names of files need not be text


class Source(ABC):
    """A data set. Rows are in a fixed order; an instance can be pickled, because worker processes read from a copy."""

    _left_out = LeftOut()
    """Files and records of the data set that are not rows; a subclass that finds some assigns its own."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def row(self, i: int) -> Row:
        """Return what is known of row `i`, without reading its content."""

    @abstractmethod
    def content(self, i: int) -> Content:
        """Return the content of row `i`; equal contents are equal samples. Called from several threads.

        Raises:
            BadSampleError: this row cannot be read; the others can.
        """

    def key(self, i: int, content: Content) -> bytes:
        """Return the sample key, 16 bytes, of row `i` with `content`: samples with one key share a state."""
        return content_key(content)

    def stamp(self, i: int) -> Stamp | None:
        """Return the stamp of the file whose bytes are the content of row `i`, so that it need not be read again.

        None (the default) if the content is not a whole file, or the file is missing: the row is read at every run.
        """
        return None

    def left_out(self) -> LeftOut:
        """Return the files and records of the data set that are not rows. Default: none."""
        return self._left_out


def split_named(name: object, where: str) -> str:
    """Return the split that `name` stands for ("val" is "validation"); raises DataError if there is none."""
    if (known := find_split(str(name))) is None:
        raise DataError(f"{where}: split {name!r}; expected one of {', '.join([*SPLITS, *_SPLIT_NAMES])}")
    return known


def find_split(name: str) -> str | None:
    """Return the split that `name` stands for, or None."""
    name = name.strip().lower()
    return name if name in SPLITS else _SPLIT_NAMES.get(name)


KeyFunction: TypeAlias = Callable[[Content], Any]
"""Content -> the value that its key digests: text, bytes, a number, an array, or lists and mappings of these."""


class Chosen(Source):
    """Some rows of another source; `functions` make the keys of those in the roles they are listed under."""

    def __init__(
        self, source: Source, rows: np.ndarray, functions: Mapping[str | None, tuple[str, KeyFunction]]
    ) -> None:
        """Choose `rows` (n,) int64; a function comes with its name, and the one listed under None is for every role."""
        self._source, self._rows, self._functions = source, rows, functions

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Row:
        return self._source.row(int(self._rows[i]))

    def content(self, i: int) -> Content:
        return self._source.content(int(self._rows[i]))

    def key(self, i: int, content: Content) -> bytes:
        """Return the key that a function makes; it includes the function's name."""
        found = self._function(i)
        if found is None:
            return self._source.key(int(self._rows[i]), content)
        name, function = found
        return content_key([name, function(content)])

    def stamp(self, i: int) -> Stamp | None:
        """Return None if a function makes the key: its result may change although the file has not."""
        return self._source.stamp(int(self._rows[i])) if self._function(i) is None else None

    def left_out(self) -> LeftOut:
        return self._source.left_out()

    def _function(self, i: int) -> tuple[str, KeyFunction] | None:
        role = role_of(self._source, int(self._rows[i])) if self._functions else None
        return self._functions.get(role, self._functions.get(None))


def with_keys(source: Source, functions: Mapping[str | None, str], setting: str) -> Source:
    """Return `source` with keys by "module:function" per role; raises ConfigError, with `setting`, if there is none."""
    loaded = {role: (name, load_function(name, setting, "content")) for role, name in functions.items()}
    return Chosen(source, np.arange(len(source)), loaded) if loaded else source


def in_role(source: Source, role: str) -> Source:
    """Return the samples of `source` in one role; raises DataError if there are none."""
    return Chosen(source, rows_in_role(source, np.arange(len(source)), role), {})


def rows_in_role(source: Source, rows: np.ndarray, role: str) -> np.ndarray:
    """Return those of `rows` (n,) int64 whose samples have the role; raises DataError if none has."""
    found = [row for row in rows.tolist() if role_of(source, row) == role]
    if not found:
        raise DataError(
            f"no sample of the data has the role {role!r}; a tower embeds those that have (of pairs, the field that "
            f"data.{role} names)"
        )
    return np.array(found, np.int64)


def role_of(source: Source, row: int) -> str | None:
    """Return "anchor" or "positive" of the samples of pairs, and None of others."""
    role = source.row(row).targets.get("role")
    return role if isinstance(role, str) else None
