"""Texts that belong together (question and answer, query and document), in a table with named fields."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records, split_at, text_at
from pipeline.data.source import Row, Source
from pipeline.errors import DataError

ROLES = ("anchor", "positive")
_ANSWERS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}


class Pairs(Source):
    """Two rows per record, the anchor and then its positive; the target `pair` is the record's number.

    Where a label says whether the two belong together, the target `belongs` is 1 or 0. Where `columns` have one of the
    two texts alone, a record is one row.
    """

    def __init__(self, name: str, columns: dict[str, pa.ChunkedArray]) -> None:
        self.name, self._columns = name, columns
        self._roles = [role for role in ROLES if role in columns]
        self._belongs = [_belongs(value, f"{name}#{i}") for i, value in enumerate(columns.get("label", ()))]

    def __len__(self) -> int:
        return len(self._roles) * len(self._columns[self._roles[0]])

    def row(self, i: int) -> Row:
        pair, role = divmod(i, len(self._roles))
        where = f"{self.name}#{pair}"
        split = split_at(self._columns.get("split"), pair, where)
        belongs = {"belongs": self._belongs[pair]} if self._belongs else {}
        return Row(where, split, {"pair": pair, "role": self._roles[role], **belongs})

    def content(self, i: int) -> str:
        pair, number = divmod(i, len(self._roles))
        role = self._roles[number]
        return text_at(self._columns[role], pair, f"{self.name}#{pair}, {role}")


def open_pairs(config: DataConfig, path: Path) -> Pairs:
    """Read the table of pairs at `path`."""
    fields = {name: getattr(config, name) for name in (*ROLES, "split", "label") if config.labelled or name in ROLES}
    named = {setting: name for setting, name in fields.items() if name is not None}
    any_of = () if config.labelled else ROLES
    return Pairs(path.name, read_records(path, named, records=config.records, any_of=any_of))


def _belongs(cell: pa.Scalar, where: str) -> int:
    value = str(cell.as_py()).strip().lower()
    if value not in _ANSWERS:
        raise DataError(f"{where}: label {cell.as_py()!r}; expected {', '.join(_ANSWERS)}: do the two belong together?")
    return _ANSWERS[value]
