"""Sentences with a tag per word: columns of a CoNLL file, or lists in a table with named fields.

Tags mark entities in IOB1, IOB2 or BIOES, and all are read into IOB2. A tag is `O`, or a letter and a type, as in
`B-Disease`. In IOB2 B- begins every entity and I- goes on with it. In IOB1 I- begins one too, and B- does only where
one of its type comes right before. In BIOES S- is an entity of one word, and E- ends a longer one; BILOU writes L- and
U- for E- and S-.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records, read_text
from pipeline.data.source import LeftOut, Row, Source
from pipeline.data.walk import files_by_split
from pipeline.errors import ConfigError, DataError

DOCUMENT = "-DOCSTART-"
COMMENT = "#"
NO_WORDS = (DOCUMENT, COMMENT)
"""What lines without a word begin with; a word may be "#", too."""

Tag: TypeAlias = tuple[str, str]
"""A letter and a type; of `O` the type is empty."""

TAG = re.compile(r"(O)|([BIESLU])(?:-(.+))?")
UNNAMED = "entity"
"""Type of entities in data with a single type that is left out, as in plain B and I."""
LETTERS = {"iob1": "OBI", "iob2": "OBI", "bioes": "OBIES"}
_SAME = {"L": "E", "U": "S"}


@dataclass(frozen=True)
class Sentence:
    """Words, and as many tags."""

    source: str
    split: str | None
    words: list[str]
    tags: list[Tag]


class Tagged(Source):
    """A row per sentence: its content is the list of words, its target `tags` their tags in IOB2, if it has any."""

    def __init__(self, sentences: Sequence[Sentence], scheme: str | None, left_out: LeftOut) -> None:
        """Take sentences with tags in `scheme`: None for none, "auto" finds it; raises DataError if tags break it."""
        if scheme == "auto":
            scheme = detect(tag for sentence in sentences for tag in sentence.tags)
        self._sentences, self._left_out = sentences, left_out
        self._tags = scheme and [to_iob2(sentence.tags, scheme, sentence.source) for sentence in sentences]

    def __len__(self) -> int:
        return len(self._sentences)

    def row(self, i: int) -> Row:
        return Row(self._sentences[i].source, self._sentences[i].split, {"tags": self._tags[i]} if self._tags else {})

    def content(self, i: int) -> list[str]:
        return self._sentences[i].words


def open_conll(config: DataConfig, path: Path) -> Tagged:
    """Read a file with a word and its tag per line and an empty line after each sentence, or a file per split."""
    words = 0 if config.words is None else int(config.words)
    tags = (-1 if config.tags is None else int(config.tags)) if config.labelled else None
    left_out = LeftOut()
    found = [one for file, split in files_by_split(path, left_out) for one in _read_conll(file, split, words, tags)]
    if not found:
        raise DataError(f"data.path {path} holds no sentences")
    return Tagged(found, config.scheme if config.labelled else None, left_out)


def open_tagged(config: DataConfig, path: Path) -> Tagged:
    """Read a table whose fields hold a list of words and a list of tags."""
    records = read_records(path, config, ("words",), ("tags", "split"))
    wanted = ("words", "tags") if config.labelled else ("words",)
    sentences = []
    for i in range(len(records)):
        where = records.where(i)
        fields = [(records.columns[name], f"{where}: field {getattr(config, name)}") for name in wanted]
        words, *others = (_texts(column, i, field) for column, field in fields)
        tags = others[0] if others else []
        if not words or (others and len(words) != len(tags)):
            raise DataError(f"{where} has {len(words)} words and {len(tags)} tags; give every word one")
        sentences.append(Sentence(where, records.split(i), words, [_parsed(tag, where) for tag in tags]))
    return Tagged(sentences, config.scheme if config.labelled else None, records.left_out)


def _read_conll(path: Path, split: str | None, word: int, tag: int | None) -> Iterator[Sentence]:
    """Yield the sentences of a file; one is called by the number of its first line."""
    lines = [line.removesuffix("\r") for line in read_text(path, "text").split("\n")]
    cells = [line.split("\t") if "\t" in line else line.split() for line in lines]
    first = next((i for i, fields in enumerate(cells) if any(fields) and not fields[0].startswith(NO_WORDS)), None)
    width = 0 if first is None else _checked_width(cells[first], word, tag, f"{path.name}:{first + 1}")
    first_line, words, tags = 0, list[str](), list[Tag]()
    for number, fields in enumerate([*cells, []], 1):
        where = f"{path.name}:{number}"
        if _is_comment(fields, width, tag):
            continue
        if not any(fields) or fields[0].startswith(DOCUMENT):
            if words:
                yield Sentence(f"{path.name}:{first_line}", split, words, tags)
            words, tags = [], []
            continue
        if len(fields) != width:
            raise DataError(f"{where} has {len(fields)} columns, the first word {width}: {fields}; mend the line")
        if not fields[word].strip():
            raise DataError(f"{where}: column {word} (data.words) is empty; every line needs a word")
        first_line = number if not words else first_line
        words.append(fields[word])
        tags += [] if tag is None else [_parsed(fields[tag].strip(), where)]


def _is_comment(fields: list[str], width: int, tag: int | None) -> bool:
    """Return whether a line is a comment: a line whose word is "#" has all columns, and a tag in the right one."""
    if not fields or not fields[0].startswith(COMMENT):
        return False
    return len(fields) != width or (tag is not None and parse(fields[tag]) is None)


def _checked_width(fields: list[str], word: int, tag: int | None, where: str) -> int:
    """Return the number of columns; check that those asked for are among them."""
    width = len(fields)
    for name, column in (("words", word), ("tags", tag)):
        if column is not None and not -width <= column < width:
            raise ConfigError(f"data.{name} is {column}; {where} has {width} columns: 0..{width - 1}, or -1 (last)")
    if tag is not None and (width == 1 or word % width == tag % width):
        raise DataError(f"{where} has {width} columns; words are in {word} and tags in {tag}: two columns are needed")
    return width


def _parsed(tag: str, where: str) -> Tag:
    if (found := parse(tag)) is None:
        raise DataError(f"{where}: the tag is {tag!r}; expected O, or B, I, E or S with a type, as in B-Disease")
    return found


def _texts(column: pa.ChunkedArray, i: int, where: str) -> list[str]:
    values = column[i].as_py()
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{where} is {str(values)[:60]!r}; expected a list of texts, none empty")
    return values


def parse(tag: str) -> Tag | None:
    """Return the letter and the type of a tag; None if it belongs to no scheme."""
    if (found := TAG.fullmatch(tag)) is None:
        return None
    outside, letter, kind = found.groups()
    return (outside, "") if outside else (_SAME.get(letter, letter), kind or UNNAMED)


def detect(tags: Iterable[Tag]) -> str:
    """Return the scheme of a data set: "bioes" or "iob1", as which valid IOB2 is read alike."""
    return "bioes" if {"E", "S"} & {letter for letter, _ in tags} else "iob1"


def to_iob2(tags: Sequence[Tag], scheme: str, where: str) -> list[str]:
    """Return the tags of one sentence in IOB2; raises DataError if they break the rules of `scheme`."""
    read = []
    inside: str | None = None  # type of the entity that the next word may go on with
    for number, (letter, kind) in enumerate(tags, 1):
        goes_on = letter in "IE" and kind == inside
        if rule := _broken(scheme, letter, inside, goes_on=goes_on):
            tag = f"{letter}-{kind}" if kind else letter
            raise DataError(f"{where}, word {number}: the tag {tag} {rule}; mend it, or set data.scheme")
        read.append("O" if letter == "O" else f"{'I' if goes_on else 'B'}-{kind}")
        inside = None if letter in "OES" else kind
    if scheme == "bioes" and inside is not None:
        raise DataError(f"{where}: the last entity, {inside}, has no end (E-); mend it, or set data.scheme")
    return read


def _broken(scheme: str, letter: str, inside: str | None, *, goes_on: bool) -> str | None:
    """Return the rule of `scheme` that a tag breaks after a word that leaves the entity `inside` open."""
    if letter not in LETTERS[scheme]:
        return f"does not occur in {scheme}"
    if letter in "IE" and not goes_on and scheme != "iob1":
        return f"goes on with no entity, which {scheme} does not allow"
    if scheme == "bioes" and inside is not None and not goes_on:
        return f"comes before the end of {inside}, which {scheme} marks by E-"
    return None
