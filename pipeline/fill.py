"""One encoder's samples -> its stores: look for what these lack, build and split the model, have its prefixes run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.cluster import Job, open_executor
from pipeline.data import SampleTable, Source, build
from pipeline.encode import quarantine
from pipeline.encode.encoded import Encoded
from pipeline.encode.feed import Chunk, Keyed, decode_rows, decode_samples
from pipeline.encode.flow import Executor, encode
from pipeline.encode.ragged import Sample
from pipeline.errors import DataError, StaleStoreError, StoreError
from pipeline.files import write_whole
from pipeline.keys import Recipe, digest
from pipeline.project import CutName, Project, proved
from pipeline.project.probe import keep_or_check_probes
from pipeline.project.workbench import Workbench
from pipeline.report.costs import Made
from pipeline.split import Prefix
from pipeline.store import Remote, Store, first_rows, remove_store
from pipeline.views import rows_by_view, split_numbers

log = logging.getLogger("recycle")

ELSEWHERE = "elsewhere.json"
"""File below data/activations that stands for a store which lies elsewhere."""
EXAMPLE = 2
"""Samples on which a split is proved; where there is one alone, it is taken twice."""


def fill(
    project: Project, source: Source, keyed: Keyed, table: SampleTable, *, rehash: bool, replace_stores: bool
) -> Made:
    """Bring the samples `keyed` of one encoder into its stores; without a model where nothing is to do.

    `project` is the encoder's part of one. `rehash` distrusts what an earlier run proved of the stores.
    `replace_stores` removes those of another recipe.

    Raises:
        StaleStoreError: there is a store of another recipe, and it is not to be replaced; nothing was changed.
    """
    circumstances = proved.circumstances(project, table)
    wanted = [keyed.keys[rows] for rows in _rows_by_view(project, keyed, table)]
    stores = None if rehash else proved.stores(project, circumstances, wanted)
    if stores is not None:
        _tell_of_one_place_twice(project.encode.cuts, stores[0])
        return Made(project, stores, Encoded.begun(keyed, len(project.encode.cuts)))
    made = _encode_what_is_missing(project, source, keyed, table, replace_stores=replace_stores)
    if proved.circumstances(project, table) == circumstances:
        proved.remember(project, circumstances, made.stores)
    return made


def _encode_what_is_missing(
    project: Project, source: Source, keyed: Keyed, table: SampleTable, *, replace_stores: bool
) -> Made:
    """Build the model, split it at every cut, and encode what the stores of their recipes lack."""
    bench = Workbench.open(project, table)
    if project.encode.executor.is_here:
        bench.to_device()
    example, samples = _example_of_source(bench, source, keyed)
    prefixes, recipes, needed = bench.freeze(samples)
    wanted = [keyed.keys[rows] for rows in _rows_by_view(project, keyed, table)]
    stores = open_stores(bench, prefixes, recipes, wanted, replace_stores=replace_stores)
    for view, of_view in zip(project.views, stores, strict=True):
        keep_or_check_probes(of_view, prefixes, bench.preprocess(view), samples, project.encode)
    for store, own in zip(stores[0], needed, strict=True):
        bench.carry(store, own)
    _tell_of_one_place_twice(project.encode.cuts, stores[0])
    if project.encode.executor.is_here:
        executor: Executor = bench.encoder(source, prefixes, stores, keyed.probes)
    else:
        executor = open_executor(Job.of(bench, source, example, keyed.probes, recipes), project.encode.executor)
    flops = bench.count_flops(prefixes, samples)
    return Made(project, stores, _encode_views(executor, project, source, keyed, table, stores), flops)


def sample_table(project: Project, source: Source, keyed: Keyed) -> SampleTable:
    """Return the sample table of the rows that are good."""
    good = keyed.good
    return build(source, keyed.keys[good], project.data, rows=good)


def open_stores(
    bench: Workbench,
    prefixes: Sequence[Prefix],
    recipes: Sequence[Sequence[Recipe]],
    wanted: Sequence[np.ndarray],
    *,
    replace_stores: bool,
) -> list[list[Store]]:
    """Open the stores of `recipes[view][cut]` for writing, `stores[view][cut]`; those that are not there are made.

    A store of another recipe is of no use to these settings, but may have taken hours: one that has samples is removed
    only if `replace_stores`, and before any is, all are looked at. One of version 0.1.0 that has all keys
    `wanted[view]` (n, 16) uint8 is opened as it is.

    Raises:
        StaleStoreError: there are stores of another recipe; the message names them, and the ways out.
    """
    project, stale, former = bench.project, dict[Path, str](), dict[Path, Store]()
    for view, of_view, keys in zip(project.views, recipes, wanted, strict=True):
        for cut, prefix, recipe in zip(project.encode.cuts, prefixes, of_view, strict=True):
            path = project.store_path(cut, view)
            try:
                project.open_store(cut, view, recipe)
            except StaleStoreError as error:
                store = project.open_store(cut, view)
                if bench.is_former(store, prefix, recipe, view) and not store.missing(keys).any():
                    former[path] = store
                elif not len(store.keys()) and project.remote is None:
                    remove_store(path)
                else:
                    stale[path] = f"{error.difference} ({store.nbytes() / 1e6:.1f} MB)"
            except StoreError:
                continue  # there is none, or a broken one: `create` tells
    if stale and (project.remote is not None or not replace_stores):
        raise StaleStoreError(_refusal(project, list(stale.values())))
    for path, told in stale.items():
        log.warning("%s; it is replaced", told)
        remove_store(path)
    return [
        [
            former.get(path) or _create(path, recipe, project.remote)
            for cut, recipe in zip(project.encode.cuts, of_view, strict=True)
            for path in [project.store_path(cut, view)]
        ]
        for view, of_view in zip(project.views, recipes, strict=True)
    ]


def _refusal(project: Project, stale: Sequence[str]) -> str:
    if project.remote is not None:
        return "; ".join([*stale, "others may use that store, so it stays: change encode.store"])
    return "\n  ".join(
        [
            "these settings make other states than the stores hold; nothing was changed:",
            *stale,
            "set it back; or replace these stores (recycle encode --replace, encode.replace: true for dvc repro); or "
            "keep them and encode elsewhere (encode.store: file:///FOLDER)",
        ]
    )


def _create(path: Path, recipe: Recipe, remote: Remote | None) -> Store:
    if remote is None:
        (path / ELSEWHERE).unlink(missing_ok=True)  # from here on it lies here
    return Store.create(path, recipe, remote)


def _tell_of_one_place_twice(names: Sequence[CutName], stores: Sequence[Store]) -> None:
    """Warn: in a shallow network several shares may fall on one block boundary. Each has its store all the same."""
    known: dict[str, CutName] = {}
    for name, store in zip(names, stores, strict=True):
        place = store.recipe.cut
        if place in known:
            log.warning("encode.cuts has %r and %r, which name one place: %s; keep one", known[place], name, place)
        known[place] = name


def _example_of_source(bench: Workbench, source: Source, keyed: Keyed) -> tuple[list[int], list[Sample]]:
    """The shortest and the longest sample that can be decoded, with their rows: on these a split is proved."""
    preprocess = bench.backbone.preprocess
    rows: list[int] = []
    samples: list[Sample] = []
    for row in keyed.outside_in().tolist():
        found = decode_samples(source, preprocess, np.asarray([row]))
        rows, samples = rows + [row] * len(found), samples + found
        if len(samples) == EXAMPLE:
            return rows, samples
    if samples:
        return rows * EXAMPLE, samples * EXAMPLE
    bad = decode_rows(source, Chunk(keyed.good, [preprocess]))[0].bad
    quarantine.write(bench.project.quarantine, [*keyed.bad, *bad], keyed.keys)
    raise DataError(
        f"none of the {len(bad)} samples can be decoded: {quarantine.summary(bad)}; see {bench.project.quarantine}, "
        "and what data.path and data.source say"
    )


def _encode_views(
    executor: Executor,
    project: Project,
    source: Source,
    keyed: Keyed,
    table: SampleTable,
    stores: Sequence[Sequence[Store]],
) -> Encoded:
    """Fill the stores, `stores[view][cut]`; return what was done.

    Where there are augmented views, a sample that turns out bad can move others to another split (the rest of its
    group, say): then what these lack where they are now is encoded too.
    """
    done, size = Encoded.begun(keyed, len(project.encode.cuts)), project.encode.segment_samples
    while True:
        found = len(done.keyed.bad)
        wanted = _rows_by_view(project, done.keyed, table)
        encode(executor, source, stores, size, wanted, done, split_numbers(keyed.keys, table))
        if len(project.views) == 1 or len(done.keyed.bad) == found:
            return done
        table = sample_table(project, source, replace(done.keyed, rows=None))


def _rows_by_view(project: Project, keyed: Keyed, table: SampleTable) -> list[np.ndarray]:
    """Return the rows that are wanted in each view: all in the plain one where there is no other."""
    if len(project.views) == 1:
        return [keyed.good]
    plain, augmented = map(keyed.meant, rows_by_view(keyed.keys, table))
    return [plain, *[augmented] * (len(project.views) - 1)]


def leave_word(made: Made) -> None:
    """Write what identifies stores that lie elsewhere where they would lie here: by it DVC sees changes."""
    project, stores = made.project, made.stores
    if project.remote is None:
        return
    for store in itertools.chain.from_iterable(stores):
        segments = store.segments()
        word = {"recipe": store.recipe.digest, "segments": len(segments), "digest": digest(segments)}
        place = project.activations / store.path.relative_to(project.remote.mirror) / ELSEWHERE
        write_whole(place, json.dumps(word, indent=2) + "\n")


def tell(made: Made) -> None:
    """Say what was encoded and cut off."""
    project, stores, done, _ = made
    keys = done.keyed.keys[done.keyed.good]
    keys = keys[first_rows(keys)]
    for cut, new, promoted, *by_view in zip(project.encode.cuts, done.new, done.promoted, *stores, strict=True):
        there = sum(int((~store.missing(keys)).sum()) for store in by_view) - new
        name = project.store_name(cut)
        log.info("cut %s: %d samples encoded, %d were there", name, new, there)
        if promoted:
            log.info("cut %s: beyond float16, stored in a wider type: %s", name, ", ".join(sorted(promoted)))
    if done.cut_off:
        longest = stores[0][0].recipe.preprocessing.get("max_length")
        log.warning(
            "%d of the texts encoded now are longer than preprocess.max_length, %s tokens, and were cut off at the end "
            "(the longest by %d); raise it as far as the backbone allows, or divide them",
            *(len(done.cut_off), longest, max(done.cut_off)),
        )
