"""Samples that are set aside, and the table of the reasons."""

import csv
import io
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.data.source import Source
from pipeline.errors import DataError
from pipeline.files import write_whole

S = TypeVar("S")
T = TypeVar("T")

ENDS_THE_RUN = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Raised while a sample is read, these end the run. All else is the sample's fault: a panic of a library written in
Rust, for one, is no `Exception`."""
FRAMES = 5
LONGEST_REASON = 300
COLUMNS = ("row", "source", "key", "reason", "traceback")


@dataclass(frozen=True)
class BadSample:
    """A sample that was set aside."""

    row: int
    source: str
    reason: str
    traceback: str = ""
    """Innermost frames, `file:line function`, the innermost first; empty where nothing was raised."""

    @property
    def kind(self) -> str:
        """The reason up to the first colon or semicolon, where the details begin."""
        return self.reason.replace(";", ":").partition(":")[0]


def attempt(compute: Callable[[], T], otherwise: Callable[[BaseException], S]) -> T | S:
    """Return the result of `compute`, or `otherwise` of the error that it raises, unless that one ends the run."""
    try:
        return compute()
    except ENDS_THE_RUN:
        raise
    except BaseException as error:
        return otherwise(error)


def set_aside(source: Source, row: int, error: BaseException) -> BadSample:
    """Return the record of a sample on which `error` was raised."""
    message = attempt(lambda: " ".join(str(error).split()), lambda _: "its message cannot be printed")
    name = type(error).__name__
    reason = message if isinstance(error, DataError) and message else f"{name}: {message}" if message else name
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON]}..."
    innermost = deque(traceback.walk_tb(error.__traceback__), maxlen=FRAMES)
    frames = (f"{Path(frame.f_code.co_filename).name}:{line} {frame.f_code.co_name}" for frame, line in innermost)
    return BadSample(row, name_of(source, row), reason, " < ".join([*frames][::-1]))


def name_of(source: Source, row: int) -> str:
    """Return the name of a row, escaped where it is not valid text; its number where the source fails."""
    return attempt(
        lambda: str(source.row(row).source).encode("utf-8", "backslashreplace").decode(), lambda _: f"row {row}"
    )


def write(path: Path, bad: Iterable[BadSample], keys: np.ndarray) -> None:
    """Write the table of `bad` samples atomically, in the order of the data set.

    `keys` (N, 16) uint8 are the keys of all rows, zeros where a row has none.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for sample in sorted(bad, key=lambda sample: sample.row):
        key = keys[sample.row].tobytes().hex() if keys[sample.row].any() else ""
        writer.writerow([sample.row, sample.source, key, sample.reason, sample.traceback])
    write_whole(path, text.getvalue())


def forget(path: Path, keys: Collection[str]) -> None:
    """Remove the rows of `keys`, in hex, from the table, if it exists."""
    if not path.exists():
        return
    text = io.StringIO()
    with path.open(newline="", encoding="utf-8") as file:
        csv.writer(text).writerows(row for row in csv.reader(file) if row[COLUMNS.index("key")] not in keys)
    write_whole(path, text.getvalue())


def summary(bad: Sequence[BadSample]) -> str:
    """Return the counts by kind, the most frequent first, each with its first sample."""
    first: dict[str, str] = {}
    for sample in sorted(bad, key=lambda sample: sample.row):
        first.setdefault(sample.kind, sample.source)
    counts = Counter(sample.kind for sample in bad)
    return ", ".join(f"{count} x {kind} (first: {first[kind]})" for kind, count in counts.most_common())
