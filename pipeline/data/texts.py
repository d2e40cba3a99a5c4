"""Labelled texts, or pairs of texts under one label, in a table with named fields."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.labelled import Labelled, label_fields
from pipeline.data.records import read_records, text_at


class Texts(Labelled):
    """A text (or a text and its partner) and a label per record of a table."""

    def content(self, i: int) -> str | tuple[str, str]:
        where = self.where(i)
        text = text_at(self._columns["text"], i, where)
        partner = self._columns.get("text_pair")
        return text if partner is None else (text, text_at(partner, i, where))


def open_texts(config: DataConfig, path: Path) -> Texts:
    """Read the table of texts at `path`."""
    texts = {name: getattr(config, name) for name in ("text", "text_pair")}
    named = {setting: name for setting, name in texts.items() if name is not None} | label_fields(config)
    columns = read_records(path, named, records=config.records, labels_as_text=config.delimiter is not None)
    return Texts(path.name, columns, config.delimiter)
