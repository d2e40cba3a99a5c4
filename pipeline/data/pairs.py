"""Texts that belong together (question and answer, query and document), in a table with named fields."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.records import Records, read_records
from pipeline.data.source import Row, Source

ROLES = ("anchor", "positive")


class Pairs(Source):
    """Two rows per record, the anchor and then its positive; the target `pair` is the record's number.

    Where the records have one of the two alone, a record is one row.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._roles = [role for role in ROLES if role in records.columns]

    def __len__(self) -> int:
        return len(self._roles) * len(self._records)

    def row(self, i: int) -> Row:
        pair, role = divmod(i, len(self._roles))
        return Row(self._records.where(pair), self._records.split(pair), {"pair": pair, "role": self._roles[role]})

    def content(self, i: int) -> str:
        pair, role = divmod(i, len(self._roles))
        return self._records.text(self._roles[role], pair)


def open_pairs(config: DataConfig, path: Path) -> Pairs:
    """Read the table of pairs at `path`."""
    fields = {name: getattr(config, name) for name in (*ROLES, "split") if config.labelled or name in ROLES}
    named = {setting: name for setting, name in fields.items() if name is not None}
    any_of = () if config.labelled else ROLES
    return Pairs(read_records(path, named, records=config.records, any_of=any_of))
