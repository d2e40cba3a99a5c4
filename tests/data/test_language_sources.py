"""Sources of language models: prompts with completions, and chats."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from source_contract import SourceContract

from pipeline.data import DataConfig, Source, open_source
from pipeline.errors import BadSampleError

CHATS = [
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    ],
    [{"role": "assistant", "content": "three"}],
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class TestCompletions(SourceContract):
    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        records = [{"q": f"q{i}", "a": f" a{i}", "author": "x"} for i in range(3)]
        path = write(folder / "a.jsonl", records)
        return {"source": "completions", "path": path, "prompt": "q", "completion": "a", "group": "author"}

    def test_a_content_is_a_prompt_and_its_completion(self, source: Source) -> None:
        assert source.content(1) == ("q1", " a1")


class TestChats(SourceContract):
    """Messages of any form, as they are, and tools where a record has some."""

    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        records = [{"m": chat, "t": TOOLS if i else None, "author": i} for i, chat in enumerate(CHATS)]
        path = write(folder / "a.jsonl", records)
        return {"source": "chat", "path": path, "messages": "m", "tools": "t", "group": "author"}

    def test_messages_and_tools_are_untouched(self, source: Source) -> None:
        assert source.content(0) == {"messages": CHATS[0]}
        assert source.content(1) == {"messages": CHATS[1], "tools": TOOLS}


def test_chats_in_other_tables(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist([{"m": CHATS[0]}, {"m": CHATS[2]}]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('m\n"' + json.dumps(CHATS[0]).replace('"', '""') + '"\n')
    for name in ("a.parquet", "a.csv"):
        source = open_source(DataConfig(source="chat", path=str(tmp_path / name), messages="m"))
        assert source.content(0) == {"messages": CHATS[0]}


def test_nulls_of_typed_columns_are_left_out(tmp_path: Path) -> None:
    chats = [CHATS[0], [{"role": "assistant", "content": "three", "name": "Ada"}]]
    pa.parquet.write_table(pa.Table.from_pylist([{"m": chat} for chat in chats]), tmp_path / "a.parquet")
    source = open_source(DataConfig(source="chat", path=str(tmp_path / "a.parquet"), messages="m"))
    assert [source.content(i)["messages"] for i in range(2)] == chats


def test_questions_and_answers_are_chats(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "one", "a": "two"}])
    source = open_source(DataConfig(source="chat", path=path, prompt="q", completion="a"))
    assert source.content(0) == {"messages": CHATS[0]}


@pytest.mark.parametrize("messages", [None, [], "no JSON", {"role": "user"}, 3])
def test_a_record_without_messages_is_set_aside(tmp_path: Path, messages: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"m": CHATS[0]}, {"m": messages}])
    source = open_source(DataConfig(source="chat", path=path, messages="m"))
    assert source.content(0) == {"messages": CHATS[0]}
    with pytest.raises(BadSampleError, match=r"no list of messages|no JSON"):
        source.content(1)


@pytest.mark.parametrize("fields", [{}, {"prompt": "q"}, {"messages": "m", "prompt": "q", "completion": "a"}])
def test_fields_of_a_chat(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="it needs messages, or chosen and rejected, or"):
        DataConfig(source="chat", path="x", **fields)
