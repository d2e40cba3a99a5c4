"""Labelled texts, or pairs of texts under one label, in a table with named fields."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.labelled import Labelled, label_fields
from pipeline.data.records import read_records


class Texts(Labelled):
    """A text (or a text and its partner) and a label per record of a table."""

    def content(self, i: int) -> str | tuple[str, str]:
        text = self._records.text("text", i)
        return (text, self._records.text("text_pair", i)) if "text_pair" in self._records.columns else text


def open_texts(config: DataConfig, path: Path) -> Texts:
    """Read the table of texts at `path`."""
    texts = {name: getattr(config, name) for name in ("text", "text_pair")}
    named = {setting: name for setting, name in texts.items() if name is not None} | label_fields(config)
    records = read_records(path, named, records=config.records, labels_as_text=config.delimiter is not None)
    return Texts(path.name, records, config.delimiter)
