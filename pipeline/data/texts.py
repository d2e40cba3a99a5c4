"""Labelled texts, or pairs of texts under one label, in a table with named fields."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.records import Records, read_records
from pipeline.data.source import Row, Source, Target
from pipeline.errors import DataError


class Texts(Source):
    """A text (or a text and its partner) and a label per record of a table."""

    def __init__(self, name: str, records: Records) -> None:
        self._records = records
        if missing := records.columns["label"].null_count:
            raise DataError(f"{name}: {missing} records have no label; give them one, or leave them out")

    def __len__(self) -> int:
        return len(self._records)

    def row(self, i: int) -> Row:
        label = _as_target(self._records.columns["label"][i].as_py())
        return Row(self._records.where(i), self._records.split(i), {"label": label})

    def content(self, i: int) -> str | tuple[str, str]:
        text = self._records.text("text", i)
        return (text, self._records.text("text_pair", i)) if "text_pair" in self._records.columns else text


def open_texts(config: DataConfig, path: Path) -> Texts:
    """Read the table of texts at `path`."""
    fields = {name: getattr(config, name) for name in ("text", "text_pair", "label", "split")}
    named = {setting: name for setting, name in fields.items() if name is not None}
    return Texts(path.name, read_records(path, named, records=config.records))


def _as_target(value: object) -> Target:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str | int | float) else str(value)
