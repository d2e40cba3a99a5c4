"""Labelled samples in a table with named fields: what every such source shares, whatever its contents are."""

from __future__ import annotations

from typing import Any

from pipeline.data.config import DataConfig
from pipeline.data.records import Records
from pipeline.data.source import Row, Source, Target
from pipeline.errors import DataError

LABEL = "label"


class Labelled(Source):
    """A labelled sample per record of a table. A subclass gives the content.

    The target `label` is the cell of the label's field; the list of cells where several fields are named (numbers to
    regress); or, with a `delimiter`, the list of the texts between the delimiters. With a field `group`, samples of one
    group are never parted by a split. Where records have no labels, there is no target.
    """

    def __init__(self, name: str, records: Records, delimiter: str | None = None) -> None:
        self._records, self._delimiter = records, delimiter
        self._labels = [column for setting, column in records.columns.items() if setting.partition(".")[0] == LABEL]
        if missing := max((column.null_count for column in self._labels), default=0):
            raise DataError(f"{name}: {missing} records have no label; give them one, or leave them out")

    def __len__(self) -> int:
        return len(self._records)

    def row(self, i: int) -> Row:
        targets: dict[str, Any] = {LABEL: self._label(i)} if self._labels else {}
        if "group" in self._records.columns:
            targets["group"] = str(self._records.columns["group"][i].as_py())
        return Row(self._records.where(i), self._records.split(i), targets)

    def _label(self, i: int) -> Any:
        cells = [column[i].as_py() for column in self._labels]
        if self._delimiter is not None:
            return [part.strip() for part in str(cells[0]).split(self._delimiter) if part.strip()]
        labels = [as_target(cell, self._records.where(i)) for cell in cells]
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
