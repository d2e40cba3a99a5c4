"""Labelled samples that a finished run is scored on: of the project, or other data of the same kind."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data import SampleTable, Source
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample
from pipeline.errors import DataError, first_few
from pipeline.project import Project
from pipeline.project.views import VIEWED
from pipeline.store import KeySet

log = logging.getLogger("recycle")


@dataclass(frozen=True)
class ScoredSamples:
    """The rows of a table to score, and their raw data where it is read."""

    data: str
    """What they are: a split of the project, or the path of other data."""
    table: SampleTable
    """Has the training samples of the run, too, which number the labels."""
    rows: np.ndarray
    """Rows of the table to score, (n,) int64."""
    source: Source | None = None
    keyed: KeyedSamples | None = None
    source_rows: np.ndarray | None = None
    """Rows of the source, (n,) int64."""
    is_new: bool = False
    """True for data given by --input, of which the store may lack states."""
    is_augmented: bool = False
    """True for the split that is stored in augmented views where views are set; its first view is scored."""

    @property
    def pairs(self) -> np.ndarray | None:
        """The pair of every row of the table, (N,); None where samples are not paired."""
        return self.table.targets.get("pair")

    def in_role(self, tower: str | None) -> np.ndarray:
        """Return the indices of the samples of one tower; all without towers."""
        if tower is None:
            return np.arange(len(self.rows))
        return np.flatnonzero(self.table.targets["role"][self.rows] == tower)

    def raw(self, chosen: np.ndarray) -> tuple[Source, KeyedSamples, np.ndarray]:
        """Return the source, its keys, and the source rows of the samples with the indices `chosen`."""
        if self.source is None or self.keyed is None or self.source_rows is None:
            raise ValueError("these samples were opened without raw data")
        return self.source, self.keyed, self.source_rows[chosen]

    def like(self, bad: Mapping[int, BadSample]) -> int:
        """Return how many samples have the content of a `bad` one, by source row."""
        if not bad:
            return 0
        _, keyed, rows = self.raw(np.arange(len(self.rows)))
        return int(KeySet(keyed.keys[list(bad)]).contains(keyed.keys[rows]).sum())


def own_samples(project: Project, split: str, *, raw: bool) -> ScoredSamples:
    """Return the samples of a split of the project, with their `raw` data if it is needed."""
    table = project.training_table()
    rows = table.rows(split)
    if not len(rows):
        known = ", ".join(np.unique(table.split).tolist())
        raise DataError(f"--split is {split}; the samples of the project are in {known}; name one of these, or --input")
    samples = ScoredSamples(f"split {split}", table, rows)
    if not raw:
        return samples
    source = project.source()
    keyed = project.keys_of(source)
    source_rows = _find(source, keyed, table, rows)
    if gone := [table.source[row] for row in rows[source_rows < 0].tolist()]:
        raise DataError(
            f"{len(gone)} samples of split {split} are not in the data set any more ({first_few(gone)}); encode it "
            "again, or leave --live out"
        )
    return replace(samples, source=source, keyed=keyed, source_rows=source_rows, is_augmented=split == VIEWED)


def input_samples(project: Project, inputs: str, split: str | None) -> ScoredSamples:
    """Return the labelled samples of the data at `inputs`, below the project's own, which number the labels."""
    unread = {} if split else {"split": None}
    data = project.data.model_copy(update={"path": inputs, "sha256": None, "validation": 0.0, **unread})
    other = replace(project, data=data)
    source = other.source()
    if left_out := source.left_out():
        log.warning("left out of the data set: %s", left_out)
    keyed = project.keys_of(source)
    found = other.sample_table(source, keyed)
    if lost := len(keyed.good) - len(found):
        log.warning("%d samples are not scored: their pairs are incomplete", lost)
    found = found if split is None else found.of(found.rows(split))
    if not len(found):
        raise DataError(f"--split is {split}; {inputs} has no sample in it; leave --split out to score all")
    table = project.training_table()
    rows = np.arange(len(table), len(table) + len(found))
    source_rows = _find(source, keyed, found, np.arange(len(found)))
    return ScoredSamples(inputs, table.with_test(found), rows, source, keyed, source_rows, is_new=True)


def _find(source: Source, keyed: KeyedSamples, table: SampleTable, rows: np.ndarray) -> np.ndarray:
    """Return the rows of `source` with the names and keys of `rows` of a table, (n,) int64; -1 where it has none."""
    known = {(source.row(row).source, keyed.keys[row].tobytes()): row for row in keyed.good.tolist()}
    return np.array([known.get((table.source[row], table.keys[row].tobytes()), -1) for row in rows.tolist()], np.int64)
