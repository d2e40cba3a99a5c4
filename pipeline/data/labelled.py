"""Samples in a table with named fields: the base of labelled ones, texts with labels, and pairs of texts."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.config import DataConfig
from pipeline.data.records import read_records
from pipeline.data.source import Row, Source, Target, is_missing
from pipeline.errors import DataError, first_few

LABEL = "label"
ROLES = ("anchor", "positive")
_ANSWERS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}


class Labelled(Source):
    """A labelled sample per record of a table. A subclass gives the content.

    The target `label`, if there are labels, is the cell of the label's field; a list of cells if several fields are
    named (numbers to regress); or, with a `delimiter`, the list of the texts between the delimiters.
    """

    def __init__(self, config: DataConfig, path: Path, *contents: str) -> None:
        """Read the fields that the settings `contents` name, and those of labels, of the table at `path`."""
        self._records = records = read_records(path, config, contents)
        self._delimiter, self._left_out = config.delimiter, records.left_out
        self._labels = [column for setting, column in records.columns.items() if setting.partition(".")[0] == LABEL]
        for setting, column in records.columns.items():
            what = setting.partition(".")[0]
            may_be_blank = config.delimiter is not None and setting == LABEL  # it holds no label of many
            if what in (LABEL, "group") and (rows := _missing(column, may_be_blank=may_be_blank)):
                named = first_few(map(records.where, rows))
                raise DataError(
                    f"{path.name}: {len(rows)} records have no {what} ({named}); give each one, or leave them out"
                )

    def __len__(self) -> int:
        return len(self._records)

    def row(self, i: int) -> Row:
        targets: dict[str, Any] = {LABEL: self._label(i)} if self._labels else {}
        if "group" in self._records.columns:
            targets["group"] = str(self._records.columns["group"][i].as_py())
        return Row(self._records.where(i), self._records.split(i), targets)

    def _label(self, i: int) -> Any:
        cells = [column[i].as_py() for column in self._labels]
        if self._delimiter is not None:
            return [part.strip() for part in str(cells[0]).split(self._delimiter) if part.strip()]
        labels = [as_target(cell, self._records.where(i)) for cell in cells]
        return labels if len(labels) > 1 else labels[0]


class Texts(Labelled):
    """A text (or a text and its partner) and a label per record of a table."""

    def __init__(self, config: DataConfig, path: Path) -> None:
        super().__init__(config, path, "text", "text_pair")

    def content(self, i: int) -> str | tuple[str, str]:
        text = self._records.text("text", i)
        return (text, self._records.text("text_pair", i)) if "text_pair" in self._records.columns else text


class Pairs(Source):
    """Two rows per record, the anchor and then its positive; the target `pair` is the record's number.

    A label that says whether the two match becomes the target `belongs`, 1 or 0. Records that have only one of the two
    give one row each.
    """

    def __init__(self, config: DataConfig, path: Path) -> None:
        self._records = records = read_records(path, config, ROLES, ("split", "label"))
        self._left_out = records.left_out
        self._roles = [role for role in ROLES if role in records.columns]
        self._belongs: list[int] = []
        for i, answer in enumerate(records.columns["label"].to_pylist() if "label" in records.columns else []):
            if (value := str(answer).strip().lower()) not in _ANSWERS:
                expected = f"expected {', '.join(_ANSWERS)}: do the two belong together?"
                raise DataError(f"{records.where(i)}: label {answer!r}; {expected}")
            self._belongs.append(_ANSWERS[value])

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


def as_target(value: object, where: str) -> Any:
    """Return a cell as a target: number, text, or a list of these; raises DataError if an item of a list is missing."""
    if isinstance(value, list):
        if any(is_missing(item) for item in value):
            raise DataError(f"{where}: the label is {value}; expected texts or numbers; leave out what is empty")
        return [as_target(item, where) for item in value]
    if isinstance(value, bool):
        return str(value).lower()
    target: Target = value if isinstance(value, str | int | float) else str(value)
    return target


def _missing(column: pa.ChunkedArray, *, may_be_blank: bool) -> list[int]:
    """Return the records without a value in a column: null, NaN, or a blank text unless it `may_be_blank`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = column.is_null()
    if pa.types.is_floating(column.type):
        missing = column.is_null(nan_is_null=True)
    elif not may_be_blank and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        missing = pc.or_(missing, pc.fill_null(pc.equal(pc.ascii_trim_whitespace(column), ""), False))
    rows: list[int] = pc.indices_nonzero(missing).to_pylist()
    return rows
