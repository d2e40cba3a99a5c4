"""A view of another source: the samples in one role, or with keys from the user's own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from pipeline.data.source import Content, LeftOut, Row, Source, Stamp
from pipeline.errors import DataError
from pipeline.files import load_function
from pipeline.keys import content_key

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
        if not self._functions:
            return None
        return self._functions.get(role_of(self._source, int(self._rows[i])), self._functions.get(None))


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
