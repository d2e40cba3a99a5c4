"""Texts that belong together (question and answer, query and document), in a table with named fields."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.config import DataConfig
from pipeline.data.records import Records, read_records
from pipeline.data.source import Row, Source, Target
from pipeline.errors import DataError

ROLES = ("anchor", "positive")
_ANSWERS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}


class Pairs(Source):
    """Two rows per record, the anchor and then its positive; the target `pair` is the record's number.

    A label that says whether the two match becomes the target `belongs`, 1 or 0. Records that have only one of the two
    give one row each.
    """

    def __init__(self, records: Records) -> None:
        self._records, self._left_out = records, records.left_out
        self._roles = [role for role in ROLES if role in records.columns]
        answers = records.columns["label"].to_pylist() if "label" in records.columns else []
        self._belongs = [_belongs(answer, records.where(i)) for i, answer in enumerate(answers)]

    def __len__(self) -> int:
        return len(self._roles) * len(self._records)

    def row(self, i: int) -> Row:
        pair, role = divmod(i, len(self._roles))
        targets: dict[str, Target] = {"pair": pair, "role": self._roles[role]}
        if self._belongs:
            targets["belongs"] = self._belongs[pair]
        return Row(self._records.where(pair), self._records.split(pair), targets)

    def content(self, i: int) -> str:
        pair, role = divmod(i, len(self._roles))
        return self._records.text(self._roles[role], pair)


def open_pairs(config: DataConfig, path: Path) -> Pairs:
    """Read the table of pairs at `path`."""
    fields = {name: getattr(config, name) for name in (*ROLES, "split", "label") if config.labelled or name in ROLES}
    named = {setting: name for setting, name in fields.items() if name is not None}
    any_of = () if config.labelled else ROLES
    return Pairs(read_records(path, named, records=config.records, any_of=any_of))


def _belongs(answer: object, where: str) -> int:
    value = str(answer).strip().lower()
    if value not in _ANSWERS:
        raise DataError(f"{where}: label {answer!r}; expected {', '.join(_ANSWERS)}: do the two belong together?")
    return _ANSWERS[value]
