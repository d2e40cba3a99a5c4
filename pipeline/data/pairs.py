"""Texts that belong together (question and answer, query and document), in a table with named fields."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.records import Records, read_records
from pipeline.data.source import Row, Source

ROLES = ("anchor", "positive")


class Pairs(Source):
    """Two rows per record, the anchor and then its positive; the target `pair` is the record's number."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return 2 * len(self._records)

    def row(self, i: int) -> Row:
        pair, role = divmod(i, 2)
        return Row(self._records.where(pair), self._records.split(pair), {"pair": pair, "role": ROLES[role]})

    def content(self, i: int) -> str:
        pair, role = divmod(i, 2)
        return self._records.text(ROLES[role], pair)


def open_pairs(config: DataConfig, path: Path) -> Pairs:
    """Read the table of pairs at `path`."""
    fields = {name: getattr(config, name) for name in (*ROLES, "split")}
    named = {setting: name for setting, name in fields.items() if name is not None}
    return Pairs(read_records(path, named, records=config.records))
