"""Samples of language models in a table with named fields: one completion or chat per record, or two to choose from."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records
from pipeline.data.source import Content, Row, Source, Target
from pipeline.errors import BadSampleError

OTHERS = ("split", "group")


PREFERENCE = ("chosen", "rejected")
"""Settings of the fields with two answers to one prompt, and the roles of the samples that they give."""


class LanguageSource(Source):
    """A sample without a label per record of a table; of preferences two, the targets `pair` and `role` tell which.

    A subclass gives the content of a record with one of its answers.
    """

    def __init__(self, config: DataConfig, path: Path, answer: str, *contents: str) -> None:
        """Read the fields that the settings `contents`, and `answer` or `PREFERENCE`, name of the table at `path`."""
        self._records = read_records(path, config, (*contents, answer, *PREFERENCE), OTHERS)
        self._left_out = self._records.left_out
        self._answers = PREFERENCE if config.chosen is not None else (answer,)

    def __len__(self) -> int:
        return len(self._answers) * len(self._records)

    def row(self, i: int) -> Row:
        record, number = divmod(i, len(self._answers))
        targets: dict[str, Target] = {}
        if self._answers == PREFERENCE:
            targets = {"pair": record, "role": PREFERENCE[number]}
        if (groups := self._records.columns.get("group")) is not None:
            targets["group"] = str(groups[record].as_py())
        return Row(self._records.where(record), self._records.split(record), targets)

    def content(self, i: int) -> Content:
        record, number = divmod(i, len(self._answers))
        return self._content(record, self._answers[number])

    @abstractmethod
    def _content(self, record: int, answer: str) -> Content:
        """Return the content of a record with the answer in the field of this setting."""


class Completions(LanguageSource):
    """A prompt with its completion per record of a table."""

    def __init__(self, config: DataConfig, path: Path) -> None:
        super().__init__(config, path, "completion", "prompt")

    def _content(self, record: int, answer: str) -> tuple[str, str]:
        return self._records.text("prompt", record), self._records.text(answer, record)


class Chats(LanguageSource):
    """A chat per record of a table: `messages`, and `tools` if that field is named, as the chat template takes them.

    Instead of messages, a record may have a prompt and a completion: a message of the user, and one of the assistant.

    A cell is a list, or its JSON. A table with typed columns (Parquet) has a null for each key that another message
    has: nulls are left out.
    """

    def __init__(self, config: DataConfig, path: Path) -> None:
        self._has_prompt = config.prompt is not None
        super().__init__(config, path, "completion" if self._has_prompt else "messages", "tools", "prompt")

    def _content(self, record: int, answer: str) -> dict[str, Any]:
        tools = {"tools": self._cell("tools", record)} if "tools" in self._records.columns else {}
        messages: Any
        if self._has_prompt:
            texts = {"user": self._records.text("prompt", record), "assistant": self._records.text(answer, record)}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
        else:
            messages = self._cell(answer, record)
        if not isinstance(messages, list) or not messages:
            raise BadSampleError(f"no chat: {self._records.where(record)}, {answer}: no list of messages")
        return {"messages": messages, **{name: value for name, value in tools.items() if value is not None}}

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
