"""How tags of words mark entities: IOB1, IOB2 and BIOES, all read into IOB2.

A tag is `O`, or a letter and a type, as in `B-Disease`. In IOB2 B- begins every entity and I- goes on with it. In IOB1
I- begins one too, and B- does only where one of its type comes right before. In BIOES S- is an entity of one word, and
E- ends a longer one; BILOU writes L- and U- for E- and S-.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from pipeline.errors import DataError

Tag: TypeAlias = tuple[str, str]
"""A letter and a type; of `O` the type is empty."""

TAG = re.compile(r"(O)|([BIESLU])(?:-(.+))?")
UNNAMED = "entity"
"""Type of entities in data with a single type that is left out, as in plain B and I."""
LETTERS = {"iob1": "OBI", "iob2": "OBI", "bioes": "OBIES"}
_SAME = {"L": "E", "U": "S"}


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
