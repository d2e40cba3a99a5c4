"""Samples of language models in a table with named fields: prompts with completions, and chats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records
from pipeline.data.source import Row, Source
from pipeline.errors import BadSampleError

OTHERS = ("split", "group")


class LanguageSource(Source):
    """A sample without a label per record of a table. A subclass gives the content."""

    def __init__(self, config: DataConfig, path: Path, *contents: str) -> None:
        """Read the fields that the settings `contents` name of the table at `path`."""
        self._records = read_records(path, config, contents, OTHERS)
        self._left_out = self._records.left_out

    def __len__(self) -> int:
        return len(self._records)

    def row(self, i: int) -> Row:
        groups = self._records.columns.get("group")
        targets = {} if groups is None else {"group": str(groups[i].as_py())}
        return Row(self._records.where(i), self._records.split(i), targets)


class Completions(LanguageSource):
    """A prompt with its completion per record of a table."""

    def __init__(self, config: DataConfig, path: Path) -> None:
        super().__init__(config, path, "prompt", "completion")

    def content(self, i: int) -> tuple[str, str]:
        return self._records.text("prompt", i), self._records.text("completion", i)


class Chats(LanguageSource):
    """A chat per record of a table: `messages`, and `tools` if that field is named, as the chat template takes them.

    Instead of messages, a record may have a prompt and a completion: a message of the user, and one of the assistant.

    A cell is a list, or its JSON. A table with typed columns (Parquet) has a null for each key that another message
    has: nulls are left out.
    """

    def __init__(self, config: DataConfig, path: Path) -> None:
        super().__init__(config, path, "messages", "tools", "prompt", "completion")

    def content(self, i: int) -> dict[str, Any]:
        if "messages" not in self._records.columns:
            texts = {"user": self._records.text("prompt", i), "assistant": self._records.text("completion", i)}
            return {"messages": [{"role": role, "content": text} for role, text in texts.items()]}
        cells = {name: self._cell(name, i) for name in ("messages", "tools") if name in self._records.columns}
        if not isinstance(cells["messages"], list) or not cells["messages"]:
            raise BadSampleError(f"no chat: {self._records.where(i)} has no list of messages")
        return {name: value for name, value in cells.items() if value is not None}

    def _cell(self, setting: str, i: int) -> Any:
        if fault := self._records.fault(setting, i):
            raise BadSampleError(fault)
        value = self._records.columns[setting][i].as_py()
        if not isinstance(value, str):
            return _without_nulls(value)
        try:
            return json.loads(value)
        except ValueError as error:
            raise BadSampleError(f"{self._records.where(i)}, {setting}: no JSON ({error})") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
