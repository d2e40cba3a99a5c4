"""The stores of a project, and what its sample tables say about them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import SampleTable
from pipeline.encode import quarantine
from pipeline.errors import ConfigError, DataError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.project import UNPACKED, Project
from pipeline.store import KeySet, Store, find_stores


@dataclass(frozen=True)
class Used:
    """What sample tables refer to.

    Attributes:
        keys: of all their samples.
        written: when the table that `encode` writes was written, in seconds since the epoch.
    """

    keys: KeySet
    written: float


def open_store(project: Project, place: Path | str, *, named: bool) -> Store:
    """Open the store at a folder or a URL that the user `named`, or in a folder that `stores_of` gave.

    Raises:
        ConfigError: the URL cannot be used.
        StoreError: it cannot be opened.
    """
    if isinstance(place, str):
        remote = project.remote_at(place)
        return Store.open(remote.mirror, remote=remote)
    return Store.open(place, remote=None if named else project.remote)


def local_stores(project: Project, named: Sequence[Path | str], verb: str) -> list[Path]:
    """Return the folders of the stores that `verb` is to change: those named, or those of all cuts, views and towers.

    Raises:
        ConfigError: there is none yet.
        StoreError: one of them lies elsewhere.
    """
    elsewhere = [place for place in named if isinstance(place, str)]
    if elsewhere or (project.remote is not None and not named):
        raise StoreError(
            f"{elsewhere[0] if elsewhere else project.encode.store}: recycle store {verb} changes stores on this "
            "machine's disk alone; recycle store info and verify also read those that lie elsewhere"
        )
    return [Path(place) for place in named or stores_of(project)]


def stores_of(project: Project) -> list[Path]:
    """Return the folders of the stores of all cuts, views and towers of params.yaml, in a mirror if they lie elsewhere.

    Raises:
        ConfigError: there is none yet.
    """
    remote = project.remote
    found = [path for path in _named(project) if (remote.find(path) if remote else path in find_stores(path))]
    if not found:
        place = project.encode.store or project.activations
        raise ConfigError(f"{place} holds no store of encode.cuts; encode first, or name a folder")
    return found


def unnamed_stores(project: Project) -> list[Path]:
    """Return the folders of stores of cuts, views and towers that params.yaml does not name."""
    return [path for path in find_stores(project.activations) if path not in _named(project)]


def _named(project: Project) -> dict[Path, str | None]:
    """The folders that params.yaml names, with the tower that each is of."""
    return {
        part.store_path(cut, view): part.tower
        for part in project.parts
        for cut in part.encode.cuts
        for view in part.views
    }


def wanted_keys(project: Project, store: Path) -> np.ndarray:
    """Return the keys (n, 16) uint8 of the sample table that belong in the folder `store`: a tower has its role's."""
    table, tower = SampleTable.read(project.samples), _named(project).get(store)
    return table.keys if tower is None else table.keys[table.targets["role"] == tower]


def used_by(table: Path, others: Sequence[Path]) -> Used:
    """Return what the sample table that `encode` writes and `others` refer to.

    Raises:
        DataError: one of them is missing, or is no sample table.
    """
    keys = [SampleTable.read(path).keys for path in (table, *others)]
    return Used(KeySet(np.concatenate(keys)), table.stat().st_mtime)


def find_samples(table: SampleTable, keys: Sequence[str], sources: Sequence[str]) -> np.ndarray:
    """Return the keys (n, 16) uint8 of samples named by key, in hex, or by what the table calls their source.

    Raises:
        ConfigError: a key is no key, or no sample has the source; one line for each.
    """
    faults, found = [], []
    for key in keys:
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            raw = b""
        found.append(raw)
        if len(raw) != KEY_BYTES:
            faults.append(f"{key!r} is no sample key: {KEY_BYTES * 2} hex digits")
    by_source: dict[str, list[bytes]] = {}
    for source, own in zip(table.source, table.keys, strict=True):
        by_source.setdefault(source, []).append(own.tobytes())
    for source in sources:
        found += by_source.get(source, [])
        if source not in by_source:
            faults.append(f"no sample of the table has the source {source!r}")
    if faults:
        raise ConfigError("\n".join(faults))
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, KEY_BYTES)


def without(table: SampleTable, keys: np.ndarray) -> SampleTable:
    """Return `table` without the samples `keys` (n, 16) uint8, and without what is left of a pair that loses one half.

    Raises:
        DataError: nothing would be left.
    """
    kept = ~KeySet(keys).contains(table.keys)
    if "pair" in table.targets:
        pairs = table.targets["pair"].tolist()
        halves = Counter(pair for pair, stays in zip(pairs, kept.tolist(), strict=True) if stays)
        kept &= np.array([halves[pair] == 2 for pair in pairs], np.bool_)
    if not kept.any():
        raise DataError("no sample would be left in the sample table; remove its file, and the stores, instead")
    return table.of(np.flatnonzero(kept))


def rewrite(table: SampleTable, path: Path) -> None:
    """Write `table` to `path` as old as what it replaces: it says nothing of segments committed since."""
    before = path.stat()
    table.write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def forget(project: Project, keys: np.ndarray) -> None:
    """Remove the samples `keys` (n, 16) uint8 where they lie beside the stores: unpacked copies, rows set aside."""
    shutil.rmtree(project.work_dir / UNPACKED, ignore_errors=True)
    quarantine.forget(project.quarantine, {key.tobytes().hex() for key in keys})
