"""The sample table: one row per sample of the data set, as Parquet. Labels live here: fixing one encodes nothing.

Columns: `key` (16 bytes), `split`, `source`, then the target columns of the data set: `label`, or `pair`, `role` and
`group` (and `belongs`), or others; a column may hold lists (a tag per word, several labels). Equal tables are equal
files.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pipeline.data.config import DataConfig
from pipeline.data.pair_groups import both_roles, pair_groups
from pipeline.data.source import SPLITS, Row, Source, Target, is_missing
from pipeline.errors import DataError, first_few
from pipeline.files import whole
from pipeline.keys import KEY_BYTES

if TYPE_CHECKING:
    import pandas as pd

_FIXED = ("key", "split", "source")
_VIEWS = b"views"
_NAMED = 3
_LABELS = ("label", "tags", "belongs")
"""Targets of which a content should have one."""


@dataclass(frozen=True)
class SampleTable:
    """One row per sample; N rows."""

    keys: np.ndarray
    """Sample keys, (N, 16) uint8."""
    split: np.ndarray
    """"train", "validation" or "test", (N,) str."""
    source: Sequence[str]
    """Where each sample comes from, for people."""
    targets: Mapping[str, np.ndarray]
    """Target columns by name, each (N,): int64, float64 or str, or object where each entry is a list of these."""
    views: int | None = None
    """Number of stored augmented views (`encode.views`): DVC sees a change here, even if it changes no store."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers of a split, ascending, int64."""
        return np.flatnonzero(self.split == split)

    def of(self, rows: np.ndarray) -> "SampleTable":
        """Return the table of some rows, (n,) int64, in their order."""
        targets = {name: values[rows] for name, values in self.targets.items()}
        sources = [self.source[row] for row in rows.tolist()]
        return SampleTable(self.keys[rows], self.split[rows], sources, targets, self.views)

    def with_test(self, other: "SampleTable") -> "SampleTable":
        """Return this table with the rows of `other` below, as test samples; raises DataError if it lacks a target."""
        if missing := sorted(self.targets.keys() - other.targets.keys()):
            known = ", ".join(other.targets) or "none"
            raise DataError(f"the data has the targets {known}; expected {', '.join(missing)} too, as in training")
        targets = {name: np.concatenate([values, other.targets[name]]) for name, values in self.targets.items()}
        split = np.concatenate([self.split, np.full(len(other), "test")])
        sources = [*self.source, *other.source]
        return SampleTable(np.concatenate([self.keys, other.keys]), split, sources, targets, self.views)

    def share(self, fraction: float, seed: int, *, by_label: bool = True) -> "SampleTable":
        """Return the table with a `fraction` of its training samples: `by_label`, the same share of each, at least one.

        Duplicates and the pairs of a group stay together. The choice depends only on keys and `seed`; a larger fraction
        contains every smaller one.
        """
        if fraction == 1:
            return self
        training = self.rows("train")
        identities = _identities(self.keys[training], {k: v[training] for k, v in self.targets.items()}, "samples")
        labels = [""] * len(training)
        if by_label and "label" in self.targets and self.targets["label"].dtype.kind in "iuU":  # floats are no classes
            labels = [str(label) for label in self.targets["label"][training]]
        strata: dict[str, dict[bytes, float]] = defaultdict(dict)
        for label, identity in zip(labels, identities, strict=True):
            strata[label][identity] = _fraction(identity, seed)
        taken: set[tuple[str, bytes]] = set()
        for label, drawn in strata.items():
            count = max(1, round(fraction * len(drawn)))
            taken |= {(label, identity) for identity in sorted(drawn, key=lambda one: (drawn[one], one))[:count]}
        kept = np.ones(len(self), bool)
        kept[training] = [(label, identity) in taken for label, identity in zip(labels, identities, strict=True)]
        return self.of(np.flatnonzero(kept))

    def write(self, path: Path) -> None:
        """Write the table to `path`, whole or not at all."""
        buffers = [None, pa.py_buffer(np.ascontiguousarray(self.keys))]
        keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(self), buffers)
        columns = {"key": keys, "split": self.split.tolist(), "source": pa.array(list(self.source), pa.string())}
        for name, values in self.targets.items():
            try:
                columns[name] = pa.array(values.tolist())
            except (pa.ArrowException, OverflowError) as error:
                raise DataError(f"the lists of the target {name} mix types ({error}); give all of them one") from error
        metadata = None if self.views is None else {_VIEWS: str(self.views)}
        with whole(path) as beside:
            pa.parquet.write_table(pa.table(columns, metadata=metadata), beside, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "SampleTable":
        """Read a table that `write` wrote; raises DataError if `path` is missing, or is no sample table."""
        try:
            table = pa.parquet.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: the sample table cannot be read ({error}); encode the data set again") from error
        missing = [name for name in _FIXED if name not in table.column_names]
        if missing or table.schema.field("key").type != pa.binary(KEY_BYTES):
            raise DataError(f"{path} is no sample table: it has {', '.join(table.column_names)}; encode again")
        keys = np.frombuffer(b"".join(table.column("key").to_pylist()), np.uint8).reshape(-1, KEY_BYTES)
        names = [name for name in table.column_names if name not in _FIXED]
        targets = {name: _column(name, table.column(name).to_pylist()) for name in names}
        split, source = (table.column(name).to_pylist() for name in ("split", "source"))
        views = (table.schema.metadata or {}).get(_VIEWS)
        return cls(keys, np.array(split, str), source, targets, None if views is None else int(views))


def write_table(path: Path, blocks: Iterable[Mapping[str, list[Any]]]) -> None:
    """Write blocks of columns, all of the same names and types, as one Parquet file, block by block.

    Raises:
        DataError: a column has values without a common type.
    """
    writer: pa.parquet.ParquetWriter | None = None
    try:
        for block in blocks:
            table = pa.table(dict(block), schema=None if writer is None else writer.schema)
            writer = writer or pa.parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"{path}: a column has values without a common type ({error}); leave it out") from error
    finally:
        if writer is not None:
            writer.close()


def build(source: Source, keys: np.ndarray, config: DataConfig, rows: np.ndarray | None = None) -> SampleTable:
    """Return the sample table of the `rows` of `source` (all, if None), whose keys (N, 16) uint8 are `keys`.

    Incomplete pairs are left out. If the data set has no validation split, the share `config.validation` of its
    training samples is held out, each by a hash of its key (pairs: of its group): other samples do not move it, and
    duplicates land on one side.

    Raises:
        DataError: no row is left, or rows disagree in their targets.
    """
    numbers = np.arange(len(source)) if rows is None else np.asarray(rows)
    described = [source.row(int(i)) for i in numbers]
    if described and "pair" in described[0].targets:
        members: dict[object, list[int]] = defaultdict(list)
        for i, row in enumerate(described):
            members[row.targets["pair"]].append(i)
        kept = [i for pair in members.values() if len(pair) == 2 for i in pair]
        described, keys = [described[i] for i in kept], keys[kept]
    if not described:
        raise DataError(f"data.path {config.path}: no usable sample is left; see the samples set aside")
    if missing := [row.source for row in described if "label" in row.targets and is_missing(row.targets["label"])]:
        named = first_few(missing)
        raise DataError(f"{len(missing)} samples have no label ({named}); give each one, or leave them out")
    targets = {name: _column(name, [_target(row, name) for row in described]) for name in described[0].targets}
    if "pair" in targets:
        targets["group"] = pair_groups(
            targets["pair"], targets["role"], keys, targets.get("belongs"), targets.get("group")
        )
    split = _decide_splits(described, _identities(keys, targets, config.hold_out), config)
    return SampleTable(np.ascontiguousarray(keys), split, [row.source for row in described], targets)


def remarks(table: SampleTable) -> list[str]:
    """Return a sentence about each contradiction: one content (equal keys) under two labels, or in two splits.

    Of pairs, whole pairs are compared.
    """
    of_pairs = {"pair", "role"} <= table.targets.keys()
    what = "pairs" if of_pairs else "contents"
    which = "pairs are another pair" if of_pairs else "samples have the content of another sample"
    repeated = _repeated(table, of_pairs=of_pairs)
    rows, lines = repeated.index.to_numpy(), []
    for name in [name for name in _LABELS if name in table.targets]:
        labels = [
            str(sorted(set(label)) if isinstance(label, list) and name != "tags" else label)  # tags alone have an order
            for label in table.targets[name][rows].tolist()
        ]
        kinds = repeated.assign(label=labels).groupby("content")["label"].transform("nunique")
        differs = repeated[kinds > 1]
        if len(differs):
            lines.append(f"{len(differs)} {which} under another {name}, first: {_named(table, differs)}")
    for split in ("validation", "test"):
        held_out, training = (repeated[table.split[rows] == name] for name in (split, "train"))
        both = np.intersect1d(held_out["content"], training["content"])
        if both.size:
            inside = repeated[repeated["content"].isin(both) & np.isin(table.split[rows], (split, "train"))]
            lines.append(f"{both.size} {what} lie in train and in {split}, first: {_named(table, inside)}")
    return lines


def _column(name: str, values: list[Target]) -> np.ndarray:
    """Return a target of all rows, (N,): numbers or texts, or an object array of lists."""
    lists = sum(isinstance(value, list) for value in values)
    if not lists:
        return np.array(values)
    if lists < len(values):
        raise DataError(f"the target {name} is a list in {lists} of {len(values)} rows; make it one in all, or in none")
    return np.fromiter(values, object, len(values))


def _target(row: Row, name: str) -> Target:
    if name not in row.targets:
        raise DataError(f"{row.source} has the targets {', '.join(row.targets)}; expected {name}, as other rows have")
    if row.targets[name] is None:
        raise DataError(f"{row.source}: the target {name} is None; give it a value, or leave the sample out")
    return row.targets[name]


def _identities(keys: np.ndarray, targets: Mapping[str, np.ndarray], hold_out: str) -> list[bytes]:
    """Return what decides the split of each row: rows with equal identities land on one side."""
    if hold_out == "labels":
        if "label" not in targets:
            raise DataError(f"data.hold_out is 'labels', but the samples have {', '.join(targets)}; set samples")
        return [f"label {value}".encode() for value in targets["label"].tolist()]
    if "belongs" in targets:  # the two of a pair stay together, whether they belong together or not
        targets = {"group": pair_groups(targets["pair"], targets["role"], keys)}
    if "group" in targets:
        return [str(value).encode() for value in targets["group"].tolist()]
    return [key.tobytes() for key in keys]


def _decide_splits(described: list[Row], identities: list[bytes], config: DataConfig) -> np.ndarray:
    given = {row.split for row in described}
    if unknown := sorted(str(split) for split in given - {None, *SPLITS}):
        raise DataError(f"the source gives the split {unknown[0]!r}; expected one of {', '.join(SPLITS)}")
    held_out = 0.0 if "validation" in given else config.validation
    splits = []
    for row, identity in zip(described, identities, strict=True):
        is_held_out = row.split in (None, "train") and _fraction(identity, config.seed) < held_out
        splits.append("validation" if is_held_out else row.split or "train")
    return np.array(splits)


def _fraction(identity: bytes, seed: int) -> float:
    """Return a number in 0..1 that looks random and depends on the arguments alone."""
    digest = hashlib.blake2b(identity, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def _repeated(table: SampleTable, *, of_pairs: bool) -> "pd.DataFrame":
    """Return the column `content`, a number for equal keys, of the rows (of pairs, the anchors') that share theirs."""
    import pandas as pd  # noqa: PLC0415  (slow to import)

    rows, keys = np.arange(len(table)), table.keys
    if of_pairs:
        pairs, roles = table.targets["pair"], table.targets["role"]
        anchors, positives = (np.flatnonzero(roles == role) for role in both_roles(roles))
        rows, positives = (found[np.argsort(pairs[found], kind="stable")] for found in (anchors, positives))
        keys = np.hstack([keys[rows], keys[positives]])
    words = pd.DataFrame(np.ascontiguousarray(keys).view(np.uint64), index=rows).sort_index()
    repeated = words[words.duplicated(keep=False)]
    return repeated.groupby(list(words.columns), sort=False).ngroup().to_frame("content")


def _named(table: SampleTable, repeated: "pd.DataFrame") -> str:
    """Name the rows of the earliest groups: `cat/1.png = dog/7.png`."""
    first = repeated["content"].unique()[:_NAMED]
    groups = (repeated.index[repeated["content"] == content][:_NAMED] for content in first)
    return ", ".join(" = ".join(table.source[row] for row in rows.tolist()) for rows in groups)
