"""The fields of a table, and what a data set made of them can be used for."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pipeline.data.formats import is_number
from pipeline.data.media import AudioFolder, ImageFolder
from pipeline.data.records import KINDS, is_saved, kind_of, read_arrow, read_objects, read_saved, with_class_names
from pipeline.data.source import find_split, is_missing
from pipeline.data.tagged import parse as parse_tag
from pipeline.errors import ConfigError

ContentKind: TypeAlias = Literal["image", "audio", "text", "array"]

RECORDS = 20_000
"""Maximum number of records that are looked at."""
MANY_CLASSES = 1000
"""Maximum number of distinct labels in classification; whole numbers with more are regressed."""
FEW_NUMBERS = 20
"""Maximum number of distinct whole numbers that are classes, however few samples each has."""
LONG = 0.95
"""Quantile of the lengths that decides what a long text is."""
LONGEST_NAME = 60
"""Maximum number of characters in the name of a class."""
PIXELS = 64
"""Minimum number of columns of numbers that are an image."""
MEDIA: dict[str, tuple[ContentKind, type[ImageFolder | AudioFolder]]] = {
    "images": ("image", ImageFolder),
    "audio": ("audio", AudioFolder),
}
"""`data.source` -> the kind of content, which is the setting of its field in a table, and the folder's reader."""
_LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "intent",
    "sentiment",
    "topic",
    "tag",
    "tags",
    "y",
    "score",
)
_TEXTS = ("text", "sentence", "review", "comment", "content", "body", "message", "utterance", "description", "title")
_PAIRS = (
    ("question", "answer"), ("anchor", "positive"), ("query", "positive"), ("query", "document"), ("query", "passage"),
    ("title", "abstract"),
)  # fmt: skip
_TWO_TEXTS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("text_a", "text_b"),
    ("question1", "question2"), ("text", "text_pair"),
)  # fmt: skip
_DELIMITERS = ("|", ";")
_COMPLETION = ("prompt", "completion")


@dataclass(frozen=True)
class DataProposal:
    """Settings that read a data set, as a look at it suggests."""

    settings: dict[str, Any]
    """Of the section `data:`."""
    task: str
    """`task.kind`."""
    content: ContentKind
    """What a sample is."""
    words: int = 0
    """Number of words of a long text; 0 where samples are no texts."""
    unused: Sequence[str] = ()
    """Fields of the table that the settings do not name."""
    samples: int = 0
    """Number of samples that were looked at; 0 where they were not counted."""


Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""The first values of each field."""


def propose_table(path: Path, file: Path) -> DataProposal:
    """Return settings that read the table, or the folder of tables, at `path`; `file` is one of them.

    Raises:
        ConfigError: no field looks like a content or like its label; the message has the fields.
        DataError: the file cannot be read.
    """
    columns = read_columns(file)
    if (pixels := _propose_pixels(path, columns)) is not None:
        return pixels
    root = file if file.is_dir() else file.parent
    splits = [name for name, values in columns.items() if _all(values, lambda v: find_split(str(v)) is not None)]
    fields = {name: values for name, values in columns.items() if name not in splits}
    proposal = _of_chats(fields) or _of_words(fields) or _of_files(fields, root) or _of_texts(fields)
    if proposal is None:
        raise ConfigError(
            f"{file} has the fields {', '.join(columns)}; none of them looks like a chat, or a text, a file or words "
            f"with a label; write params.yaml by hand (docs/tasks.md), or give the fields other names"
        )
    settings = {"source": proposal.settings["source"], "path": str(path), **proposal.settings}
    if splits and file == path:
        settings["split"] = splits[0]
    unused = [name for name in columns if name not in settings.values()]
    samples = max(map(len, columns.values()))
    return DataProposal(settings, proposal.task, proposal.content, proposal.words, unused, samples)


def read_columns(file: Path) -> dict[str, list[Any]]:
    """Return the first `RECORDS` values of each field of a table, or of the first part of a saved data set.

    Raises:
        ConfigError: it is no table.
        DataError: it cannot be read.
    """
    if is_saved(file):
        table = read_saved(file)[0][2]
    elif kind_of(file) not in KINDS:
        raise ConfigError(f"{file} is no table; expected a name that ends in {', '.join(KINDS)}")
    elif kind_of(file) in (".jsonl", ".json"):
        records = [one for one in read_objects(file)[:RECORDS] if isinstance(one, dict)]
        names = dict.fromkeys(name for one in records for name in one)
        return {name: [one.get(name) for one in records] for name in names}
    else:
        table = read_arrow(file)
    table = table.slice(0, RECORDS)
    if len(set(table.column_names)) < table.num_columns:  # a table of pixels without a header
        table = table.rename_columns([str(number) for number in range(table.num_columns)])
    return {name: with_class_names(table, name).to_pylist() for name in table.column_names}


def percentile(lengths: Sequence[int]) -> int:
    """Return the length that the share `LONG` of all does not exceed; 0 of none."""
    return sorted(lengths)[math.ceil(LONG * len(lengths)) - 1] if lengths else 0


def _propose_pixels(path: Path, columns: Columns) -> DataProposal | None:
    """Return the settings of a table with a column per pixel and one of labels."""
    count = len(columns) - 1
    is_image = any(math.isqrt(count // colours) ** 2 * colours == count for colours in (1, 3))
    if count < PIXELS or not is_image or not all(_all(values, _is_numeric) for values in columns.values()):
        return None
    first, *_, last = columns.values()
    label = min((0, first), (-1, last), key=lambda end: (len(set(end[1])) == 1, max(map(float, end[1]))))[0]
    return DataProposal({"source": "pixels", "path": str(path), "label": label}, "classification", "image")


def _of_chats(columns: Columns) -> DataProposal | None:
    """Return the settings of a table with a list of messages, or with prompts and completions."""
    for name, values in columns.items():
        if _all(values, lambda value: isinstance(value, list) and _all(value, _is_message)):
            words = [sum(len(str(one.get("content")).split()) for one in value) for value in values if value]
            return DataProposal({"source": "chat", "messages": name}, "lm", "text", percentile(words))
    if all(_all(columns.get(name, ()), _is_text) for name in _COMPLETION):
        words = [len(f"{one} {other}".split()) for one, other in zip(*map(columns.get, _COMPLETION), strict=True)]
        return DataProposal(
            {"source": "completions", **{name: name for name in _COMPLETION}}, "lm", "text", percentile(words)
        )
    return None


def _of_words(columns: Columns) -> DataProposal | None:
    """Return the settings of a table with a list of words and a list of tags."""
    lists = {n: v for n, v in columns.items() if _all(v, lambda x: isinstance(x, list) and _all(x, _is_text))}
    tags = [n for n, v in lists.items() if all(parse_tag(tag) is not None for value in v for tag in value or ())]
    words = [name for name in lists if name not in tags]
    if not tags or not words:
        return None
    settings = {"source": "tagged", "words": words[0], "tags": tags[0]}
    return DataProposal(settings, "tagging", "text", percentile([len(value) for value in columns[words[0]]]))


def _of_files(columns: Columns, root: Path) -> DataProposal | None:
    """Return the settings of a table that names or holds images or sounds."""
    for source, (setting, folder) in MEDIA.items():
        for name, values in columns.items():
            if _all(values, lambda value: _is_file(value, root, folder.extensions)):  # noqa: B023 (called here)
                label = _label({other: v for other, v in columns.items() if other != name})
                return label and DataProposal({"source": source, setting: name, **label[0]}, label[1], setting)
    return None


def _of_texts(columns: Columns) -> DataProposal | None:
    """Return the settings of a table of labelled texts, or of pairs of texts."""
    texts = [name for name, values in columns.items() if _all(values, _is_text) and not _are_classes(values)]
    texts.sort(key=lambda name: _rank(name, _TEXTS))
    words = percentile([len(str(value).split()) for name in texts[:2] for value in columns[name]])
    by_name = {name.lower(): name for name in columns}
    labels = {name: values for name, values in columns.items() if name not in texts}
    has_label = any(name.lower() in _LABELS for name in labels)
    for first, second in _PAIRS:
        if first in by_name and second in by_name and not has_label:
            settings = {"source": "pairs", "anchor": by_name[first], "positive": by_name[second]}
            return DataProposal(settings, "similarity", "text", words)
    label = _label(labels)
    if not texts or label is None:
        return None
    for first, second in _TWO_TEXTS:
        if first in by_name and second in by_name:
            both = {"text": by_name[first], "text_pair": by_name[second]}
            return DataProposal({"source": "text", **both, **label[0]}, label[1], "text", 2 * words)
    return DataProposal({"source": "text", "text": texts[0], **label[0]}, label[1], "text", words)


def _label(columns: Columns) -> tuple[dict[str, Any], str] | None:
    """Return the settings of the field that is most likely the label, and the task it suggests."""
    kinds = {name: kind for name, values in columns.items() if (kind := _label_kind(values)) is not None}
    name = min(kinds, key=lambda name: (_rank(name, _LABELS), kinds[name][1] == "regression"), default=None)
    return None if name is None else ({"label": name, **kinds[name][0]}, kinds[name][1])


def _label_kind(values: Sequence[Any]) -> tuple[dict[str, Any], str] | None:
    """Return further settings of a field of labels and the task it suggests; None where it cannot be labels."""
    known = [value for value in values if not is_missing(value)]
    if not known:
        return None
    if _all(known, lambda value: isinstance(value, list)):
        return ({}, "multi-label") if all(map(_is_text, chain(*known))) else None
    if not _all(known, lambda value: isinstance(value, str | int | float)) or len(set(known)) < 2:
        return None
    for delimiter in _DELIMITERS if _all(known, _is_text) else ():
        parts = [part.strip() for value in known for part in str(value).split(delimiter)]
        if len(parts) > len(known) and _are_classes(parts):
            return {"delimiter": delimiter}, "multi-label"
    if _all(known, _is_numeric):
        distinct = len(set(map(float, known)))
        whole = all(float(value).is_integer() for value in known)
        is_class = whole and distinct <= MANY_CLASSES and (distinct <= FEW_NUMBERS or distinct <= len(known) / 4)
        return {}, "classification" if is_class else "regression"
    return ({}, "classification") if _are_classes(known) else None


def _are_classes(values: Sequence[Any]) -> bool:
    """Return whether texts are names of classes: few, short, and most of them occur several times."""
    known = [str(value) for value in values if not is_missing(value)]
    distinct = set(known)
    is_short = percentile([len(name) for name in distinct]) <= LONGEST_NAME
    return is_short and 2 <= len(distinct) <= max(2, min(MANY_CLASSES, len(known) / 2))


def _rank(name: str, hints: Sequence[str]) -> int:
    """Return the place of a field's name, or of a word in it, among `hints`; their number if it is not there."""
    words = {name.lower(), *re.split(r"[^a-z0-9]+", name.lower())}
    return next((place for place, hint in enumerate(hints) if hint in words), len(hints))


def _all(values: Sequence[Any], holds: Callable[[Any], bool]) -> bool:
    """Return whether a condition holds for every value that is there, of which there is one or more."""
    known = [value for value in values if not is_missing(value)]
    return bool(known) and all(map(holds, known))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and is_number(value))


def _is_file(value: Any, root: Path, extensions: frozenset[str]) -> bool:
    """Return whether a cell names a file of a kind below `root`, or holds its bytes and name."""
    name = value.get("path") if isinstance(value, dict) and set(value) == {"bytes", "path"} else value
    if not isinstance(name, str) or Path(name).suffix.lower() not in extensions:
        return False
    return isinstance(value, dict) or (root / name).is_file()
