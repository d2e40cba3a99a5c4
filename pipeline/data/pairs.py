"""Texts that belong together (question and answer, query and document), in a table with named fields."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records, split_at, text_at
from pipeline.data.source import Row, Source

ROLES = ("anchor", "positive")


class Pairs(Source):
    """Two rows per record, the anchor and then its positive; the target `pair` is the record's number."""

    def __init__(self, name: str, columns: dict[str, pa.ChunkedArray]) -> None:
        self.name, self._columns = name, columns

    def __len__(self) -> int:
        return 2 * len(self._columns["anchor"])

    def row(self, i: int) -> Row:
        pair, role = divmod(i, 2)
        where = f"{self.name}#{pair}"
        return Row(where, split_at(self._columns.get("split"), pair, where), {"pair": pair, "role": ROLES[role]})

    def content(self, i: int) -> str:
        pair, role = divmod(i, 2)
        return text_at(self._columns[ROLES[role]], pair, f"{self.name}#{pair}, {ROLES[role]}")


def open_pairs(config: DataConfig, path: Path) -> Pairs:
    """Read the table of pairs at `path`."""
    fields = {name: getattr(config, name) for name in (*ROLES, "split")}
    named = {setting: name for setting, name in fields.items() if name is not None}
    return Pairs(path.name, read_records(path, named, records=config.records))
