"""Labelled samples in a table with named fields: what every such source shares, whatever its contents are."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.records import split_at
from pipeline.data.source import Row, Source, Target
from pipeline.errors import DataError

LABEL = "label"


class Labelled(Source):
    """A labelled sample per record of a table; `columns` by setting, as Arrow arrays. A subclass gives the content.

    The target `label` is the cell of the label's field; the list of cells where several fields are named (numbers to
    regress); or, with a `delimiter`, the list of the texts between the delimiters. With a field `group`, samples of one
    group are never parted by a split. Where columns have no labels, there is no target.
    """

    def __init__(self, name: str, columns: dict[str, pa.ChunkedArray], delimiter: str | None = None) -> None:
        self.name, self._columns, self._delimiter = name, columns, delimiter
        self._labels = [column for setting, column in columns.items() if setting.partition(".")[0] == LABEL]
        if missing := max((column.null_count for column in self._labels), default=0):
            raise DataError(f"{name}: {missing} records have no label; give them one, or leave them out")

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def where(self, i: int) -> str:
        """Return the name of row `i`, for people."""
        return f"{self.name}#{i}"

    def row(self, i: int) -> Row:
        where = self.where(i)
        targets: dict[str, Any] = {LABEL: self._label(i)} if self._labels else {}
        if "group" in self._columns:
            targets["group"] = str(self._columns["group"][i].as_py())
        return Row(where, split_at(self._columns.get("split"), i, where), targets)

    def _label(self, i: int) -> Any:
        cells = [column[i].as_py() for column in self._labels]
        if self._delimiter is not None:
            return [part.strip() for part in str(cells[0]).split(self._delimiter) if part.strip()]
        labels = [as_target(cell, self.where(i)) for cell in cells]
        return labels if len(labels) > 1 else labels[0]


def label_fields(config: DataConfig) -> dict[str, str]:
    """Return the settings that every labelled table shares -> the names of their fields; none where not `labelled`."""
    if not config.labelled:
        return {}
    labels = config.label if isinstance(config.label, tuple) else (config.label,)
    named = {LABEL if not number else f"{LABEL}.{number}": name for number, name in enumerate(labels)}
    named |= {"split": config.split, "group": config.group}
    return {setting: str(name) for setting, name in named.items() if name is not None}


def as_target(value: object, where: str) -> Any:
    """Return a cell as a target: a number, a text, or a list of these.

    Raises:
        DataError: a list holds nothing in some place.
    """
    if isinstance(value, list):
        if None in value:
            raise DataError(f"{where}: the label is {value}; expected a list of texts or of numbers; leave None out")
        return [as_target(item, where) for item in value]
    if isinstance(value, bool):
        return str(value).lower()
    target: Target = value if isinstance(value, str | int | float) else str(value)
    return target
