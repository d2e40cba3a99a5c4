"""Labelled texts, or pairs of texts under one label, in a table with named fields."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records, split_at, text_at
from pipeline.data.source import Row, Source, Target
from pipeline.errors import DataError


class Texts(Source):
    """A text (or a text and its partner) and a label per record of a table; `columns` by setting, as Arrow arrays.

    The label's column may be left out.
    """

    def __init__(self, name: str, columns: dict[str, pa.ChunkedArray]) -> None:
        self.name, self._columns = name, columns
        if missing := columns["label"].null_count if "label" in columns else 0:
            raise DataError(f"{name}: {missing} records have no label; give them one, or leave them out")

    def __len__(self) -> int:
        return len(self._columns["text"])

    def row(self, i: int) -> Row:
        where = f"{self.name}#{i}"
        labels = self._columns.get("label")
        targets = {} if labels is None else {"label": _as_target(labels[i].as_py())}
        return Row(where, split_at(self._columns.get("split"), i, where), targets)

    def content(self, i: int) -> str | tuple[str, str]:
        where = f"{self.name}#{i}"
        text = text_at(self._columns["text"], i, where)
        partner = self._columns.get("text_pair")
        return text if partner is None else (text, text_at(partner, i, where))


def open_texts(config: DataConfig, path: Path) -> Texts:
    """Read the table of texts at `path`."""
    known = ("label", "split") if config.labelled else ()
    fields = {name: getattr(config, name) for name in ("text", "text_pair", *known)}
    named = {setting: name for setting, name in fields.items() if name is not None}
    return Texts(path.name, read_records(path, named, records=config.records))


def _as_target(value: object) -> Target:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str | int | float) else str(value)
