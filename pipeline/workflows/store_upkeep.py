"""Maintenance of stores, the verbs of `recycle store`: describe, verify, collect garbage, compact, remove samples."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import SampleTable
from pipeline.encode import quarantine
from pipeline.errors import ConfigError, DataError, StoreError
from pipeline.keys import KEY_BYTES
from pipeline.project import UNPACKED, Project
from pipeline.project.stores import open_store, stores_of, unnamed_stores, wanted_keys
from pipeline.store import (
    KeySet,
    Store,
    UpkeepPlan,
    describe,
    exclusive_access,
    find_stores,
    folder_nbytes,
    format_bytes,
    format_facts,
    own_entries,
    plan_compact,
    plan_gc,
    plan_removal,
    remove_store,
    sweep,
)


@dataclass(frozen=True)
class Dialog:
    """The user of a command: where lines are printed, and who confirms a plan.

    Attributes:
        confirm: returns whether to carry out the plan that was printed.
        progress: wraps items in a progress bar, given a label and the name of an item.
        changes: whether the command may change anything; False for a dry run.
    """

    say: Callable[[str], None]
    confirm: Callable[[], bool]
    progress: Callable[[str, str], Callable[[Sequence[Any]], Iterable[Any]]]
    changes: bool = True


def describe_store(project: Project, store: Store) -> Iterator[str]:
    """Yield lines on the contents of `store`, the samples it lacks, and what compact or gc would change."""
    yield from format_facts(describe(store))
    if store.remote is None:
        compact = plan_compact(store.path, store.recipe, project.encode.segment_samples)
        if compact.changes:
            yield f"  compact: {_replaced(compact)}"
    if not project.samples.exists():
        return
    lacking = store.missing(wanted_keys(project, store.path))
    yield f"  of {project.samples} it has {(~lacking).sum():,} of {len(lacking):,} samples"
    if store.remote is not None:
        return
    used = used_by(project.samples, [])
    garbage = plan_gc(store.path, used.keys, used.written, rewrite=True)
    if garbage.changes:
        yield f"  gc --rewrite: frees {_freed(garbage)}"


def verify_stores(project: Project, named: Sequence[Path | str], dialog: Dialog) -> list[str]:
    """Compare every byte of the `named` stores, or of all, with its checksum; return the faults, one line each."""
    from pipeline.library.table import faults_of_items  # noqa: PLC0415  (slow to import, and `info` needs no torch)
    from pipeline.store import verify  # noqa: PLC0415

    faults = []
    for place in named or stores_of(project):
        try:
            store = open_store(project, place, named=bool(named))
            faults += verify(store, dialog.progress(f"verify {store.where}", "segment"))
            faults += faults_of_items(store)
        except StoreError as error:
            faults.append(str(error))
    return faults


def collect_garbage(
    project: Project, paths: Sequence[Path], keep: Sequence[Path], dialog: Dialog, *, rewrite: bool, cuts: bool
) -> list[str]:
    """Remove segments of the stores `paths` that no sample table refers to; return faults as `carry_out`.

    Args:
        keep: further sample tables whose samples stay.
        rewrite: also remove unused samples from segments that have others.
        cuts: also remove stores that the settings do not name.
    """
    used = used_by(project.samples, keep)
    removed = unnamed_stores(project) if cuts else []
    if cuts and dialog.changes:
        for folder in {project.activations, *(path.parent for path in removed)}:
            sweep(folder)
    faults = carry_out(
        paths,
        lambda store: plan_gc(store.path, used.keys, used.written, rewrite=rewrite),
        dialog,
        removed=removed,
    )
    return faults or []


def remove_samples(project: Project, keys: Sequence[str], sources: Sequence[str], dialog: Dialog) -> list[str]:
    """Remove samples, given by key in hex or by source, from all stores, the sample table and the quarantine.

    Returns faults as `carry_out`.
    """
    table = SampleTable.read(project.samples)
    unwanted = find_samples(table, keys, sources)
    smaller = without(table, unwanted)
    dialog.say(f"{project.samples}: {len(table) - len(smaller):,} of {len(table):,} rows go")
    faults = carry_out(
        find_stores(project.activations),
        lambda store: plan_removal(store.path, unwanted),
        dialog,
        also=len(smaller) < len(table),
    )
    if faults == []:
        rewrite_table(smaller, project.samples)
        forget(project, unwanted)
        dialog.say(
            "Remove these samples from the data set too, or the next encode brings them back. What DVC keeps of "
            "earlier versions goes with `dvc commit` and then `dvc gc --workspace`, of a remote with --cloud."
        )
    return faults or []


def carry_out(
    paths: Sequence[Path],
    plan: Callable[[Store], UpkeepPlan],
    dialog: Dialog,
    *,
    removed: Sequence[Path] = (),
    also: bool = False,
) -> list[str] | None:
    """Print the `plan` of each store, ask, and carry it out while nobody else writes.

    `removed` are stores to remove as a whole; `also` says that there is something else to do. Returns the faults, one
    line each; None where nothing was done.
    """
    with ExitStack() as locks:
        stores = [Store.open(path) for path in paths]
        for path in [*paths, *removed] if dialog.changes else []:
            locks.enter_context(exclusive_access(path))
        plans = [plan(store) for store in stores]
        for store, upkeep in zip(stores, plans, strict=True):
            for line in _announcement(upkeep):
                dialog.say(f"{store.path}: {line}")
        for path in removed:
            nbytes = sum(map(folder_nbytes, own_entries(path)))
            dialog.say(f"{path}: of no cut, view or tower of the settings; all of it goes, {format_bytes(nbytes)}")
        if not removed and not also and not any(upkeep.changes or upkeep.leftovers for upkeep in plans):
            dialog.say("nothing to do")
            return None
        if not (dialog.changes and dialog.confirm()):
            return None
        from pipeline.store import apply_changes  # noqa: PLC0415  (torch is slow to import)

        faults = []
        for store, upkeep in zip(stores, plans, strict=True):
            faults += apply_changes(store, upkeep.changes, dialog.progress(str(store.path), "change"))
        for path in reversed(removed):  # stores of views before the store that contains them
            remove_store(path)
    return faults


def _announcement(upkeep: UpkeepPlan) -> Iterator[str]:
    if upkeep.changes:
        yield f"{_replaced(upkeep)}; this frees {_freed(upkeep)}"
    if upkeep.leftovers:
        yield f"{upkeep.leftovers:,} temporary folders of killed writers go"
    yield from upkeep.left


def _replaced(upkeep: UpkeepPlan) -> str:
    new = f", {upkeep.new_segments:,} come in their place" if upkeep.new_segments else ""
    return f"{upkeep.segments:,} segments go{new}"


def _freed(upkeep: UpkeepPlan) -> str:
    return f"{upkeep.samples:,} samples and about {format_bytes(upkeep.bytes)}"


@dataclass(frozen=True)
class Used:
    """The samples that sample tables refer to.

    Attributes:
        keys: of all their samples.
        written: when the table that `encode` writes was written, in seconds since the epoch.
    """

    keys: KeySet
    written: float


def used_by(table: Path, others: Sequence[Path]) -> Used:
    """Return the samples of the sample table of `encode` and of `others`.

    Raises:
        DataError: one of them is missing, or is no sample table.
    """
    keys = [SampleTable.read(path).keys for path in (table, *others)]
    return Used(KeySet(np.concatenate(keys)), table.stat().st_mtime)


def find_samples(table: SampleTable, keys: Sequence[str], sources: Sequence[str]) -> np.ndarray:
    """Return the keys (n, 16) uint8 of samples given by key, in hex, or by their source in the table.

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
    """Return `table` without the samples `keys` (n, 16) uint8 and without the other halves of their pairs.

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


def rewrite_table(table: SampleTable, path: Path) -> None:
    """Write `table` to `path` with the times of the file it replaces: segments committed since stay protected."""
    before = path.stat()
    table.write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def forget(project: Project, keys: np.ndarray) -> None:
    """Remove the samples `keys` (n, 16) uint8 from the unpacked copies and from the quarantine."""
    shutil.rmtree(project.work_dir / UNPACKED, ignore_errors=True)
    quarantine.forget(project.quarantine, {key.tobytes().hex() for key in keys})
