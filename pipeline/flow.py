"""The three stages of dvc.yaml, told from top to bottom: encode, train, report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from pipeline import processes, proved, quarantine, runs
from pipeline.checkpoint import alone
from pipeline.cluster import Job, open_executor
from pipeline.costs import read_costs, write_costs
from pipeline.data import SampleTable, Source, build, rows_in_role
from pipeline.encode import Executor, encode
from pipeline.encoded import Encoded
from pipeline.epochs import open_joint_loaders, open_loaders
from pipeline.errors import DataError, StaleStoreError
from pipeline.feed import Chunk, Keyed, decode_rows, decode_samples
from pipeline.files import write_whole
from pipeline.keys import Recipe, digest
from pipeline.project import CutName, Project
from pipeline.quarantine import BadSample
from pipeline.ragged import Sample
from pipeline.report import Row, Run, curves, plot, summarise
from pipeline.store import Remote, Store, first_rows, remove
from pipeline.timing import seconds_per_sample
from pipeline.towers import Tower, fresh, joined, open_tower, plain_weights
from pipeline.train import Batches, Summary, fit, open_accelerator
from pipeline.views import by_split, rows_by_view
from pipeline.workbench import Workbench

log = logging.getLogger("recycle")

ELSEWHERE = "elsewhere.json"
"""File below data/activations that stands for a store which lies elsewhere."""
EXAMPLE = 2
"""Samples on which a split is proved; where there is one alone, it is taken twice."""


def encode_project(project: Project, *, rehash: bool = False) -> bool:
    """Bring every sample into the store of every cut; write the sample table, the samples set aside and the costs.

    Files that did not change are not read, and where nothing is to do no model is built; `rehash` distrusts what was
    known of both. Returns whether the bad samples stay within `encode.max_bad`.
    """
    source = project.source()
    keyed = project.keys_of(source, trust=not rehash)
    if not len(keyed.good):
        quarantine.write(project.quarantine, keyed.bad, keyed.keys)  # the table will say that nothing is left
    table, bad, made = _table(source, keyed, project), keyed.bad, []
    for part in project.parts:
        rows = None if part.tower is None else rows_in_role(source, keyed.good, part.tower)
        stores, done = _encode_part(part, source, replace(keyed, bad=bad, rows=rows), table, rehash=rehash)
        made.append((part, stores, done))
        bad = done.keyed.bad
    if len(bad) > len(keyed.bad):
        table = _table(source, replace(keyed, bad=bad), project)
    table.write(project.samples)
    quarantine.write(project.quarantine, bad, keyed.keys)
    write_costs(project, made)
    for part, stores, _ in made:
        _leave_word(part, [store for of_view in stores for store in of_view])
    for part, stores, done in made:
        _tell(part, stores, done)
    return _tell_of_bad(project, bad, len(keyed.keys))


def _encode_part(
    project: Project, source: Source, keyed: Keyed, table: SampleTable, *, rehash: bool
) -> tuple[list[list[Store]], Encoded]:
    """Bring the samples of one encoder into its stores, `stores[view][cut]`; without a model where nothing is to do."""
    circumstances = proved.circumstances(project, table)
    wanted = [keyed.keys[rows] for rows in _rows_by_view(project, keyed, table)]
    stores = None if rehash else proved.stores(project, circumstances, wanted)
    if stores is not None:
        _tell_of_one_place_twice(project.encode.cuts, stores[0])
        return stores, Encoded.begun(keyed, len(project.encode.cuts))
    stores, done = _encode_what_is_missing(project, source, keyed, table)
    if proved.circumstances(project, table) == circumstances:
        proved.remember(project, circumstances, stores)
    return stores, done


def _encode_what_is_missing(
    project: Project, source: Source, keyed: Keyed, table: SampleTable
) -> tuple[list[list[Store]], Encoded]:
    """Build the model, split it at every cut, and encode what the stores of their recipes lack; `stores[view][cut]`."""
    bench = Workbench.open(project, table)
    if project.encode.executor.is_here:
        bench.to_device()
    example, samples = _example_of_source(bench, source, keyed)
    prefixes, recipes, needed = bench.freeze(samples)
    stores = [
        [
            _open_or_replace(project.store_path(cut, view), recipe, project.remote)
            for cut, recipe in zip(project.encode.cuts, of_view, strict=True)
        ]
        for view, of_view in zip(project.views, recipes, strict=True)
    ]
    for store, own in zip(stores[0], needed, strict=True):
        bench.carry(store, own)
    _tell_of_one_place_twice(project.encode.cuts, stores[0])
    if project.encode.executor.is_here:
        executor: Executor = bench.encoder(source, prefixes, stores, keyed.probes)
    else:
        executor = open_executor(Job.of(bench, source, example, keyed.probes, recipes), project.encode.executor)
    return stores, _encode_views(executor, project, source, keyed, table, stores)


def train_project(project: Project, cut_name: str, name: str | None = None) -> Run:
    """Fine-tune the suffix of one cut from its store; the raw data is not read. The run is called `name`.

    Where the weights that params.yaml names are not on this machine, those that the store carries do. Where
    several processes were started, each runs this with its share of the samples, and the main one writes.
    """
    cut = project.cut(cut_name)
    name = name or runs.run_name(project, cut)
    out = project.run_path(name)
    accelerator = open_accelerator(project.train)
    set_seed(project.train.seed, device_specific=True)  # no process drops what another one does
    table = SampleTable.read(project.samples).share(project.data.fraction, project.data.seed)
    towers = [open_tower(part, cut, table, to_train=True) for part in project.parts]
    identity = runs.identity(project, cut)
    with alone(project.scratch / "checkpoints" / identity) as checkpoint:
        summary = _train(project, table, towers, accelerator, out, checkpoint)
    finished = Run(
        name=name,
        cut=cut,
        overrides=project.overrides,
        identity=identity,
        settings=runs.settings(project, table),
        recycled=min(tower.prefix.cut.share for tower in towers),
        metric=summary.metric,
        value=summary.value,
        initial=summary.initial,
        best_epoch=summary.best_epoch,
        train_samples=len(table.rows("train")),
        train_seconds_per_epoch=summary.train_seconds_per_epoch,
        frozen_seconds_per_sample=processes.on_main(lambda: _frozen_cost(towers, accelerator.device)),
        history=summary.history,
        legend=towers[0].bench.task.legend(table),
    )
    if accelerator.is_main_process:
        runs.write(project, finished)
    log.info("run %s: %s %.3f after epoch %d", name, summary.metric, summary.value, summary.best_epoch)
    return finished


def _train(
    project: Project,
    table: SampleTable,
    towers: Sequence[Tower],
    accelerator: Accelerator,
    out: Path,
    checkpoint: Path,
) -> Summary:
    """Train what follows the cut of `towers`, and leave it in the folder `out`."""
    suffix = joined(towers)
    if project.train.channels_last:
        suffix.to(memory_format=torch.channels_last)
    training, validation = _open_loaders(towers, table, accelerator.device)
    if accelerator.is_main_process:
        shutil.rmtree(out, ignore_errors=True)
    else:
        for tower in towers:
            tower.bench.backbone.model.to("meta")  # the suffix has its own weights, and the main process the others
    return fit(
        suffix,
        towers[0].bench.task,
        training,
        validation,
        project.train,
        out=out,
        checkpoint=checkpoint,
        accelerator=accelerator,
        fresh=fresh(towers),
        weights=plain_weights if project.train.adapter else nn.Module.state_dict,
    )


def report_project(project: Project) -> list[Row]:
    """Write the result table, the curves and the plot of all finished runs."""
    costs, finished = read_costs(project), runs.current(project)
    rows = summarise(finished, costs)
    (project.results / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    curves(finished, costs).to_csv(project.results / "curves.csv", index=False)
    plot(finished, costs, project.results / "runs.png")
    return rows


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


def _tell_of_one_place_twice(names: Sequence[CutName], stores: Sequence[Store]) -> None:
    """Warn: in a shallow network several shares may fall on one block boundary. Each has its store all the same."""
    known: dict[str, CutName] = {}
    for name, store in zip(names, stores, strict=True):
        place = store.recipe.cut
        if place in known:
            log.warning("encode.cuts has %r and %r, which name one place: %s; keep one", known[place], name, place)
        known[place] = name


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
        wanted = [by_split(rows, keyed.keys, table) for rows in _rows_by_view(project, done.keyed, table)]
        encode(executor, source, stores, size, wanted, done)
        if len(project.views) == 1 or len(done.keyed.bad) == found:
            return done
        table = _table(source, replace(done.keyed, rows=None), project)


def _rows_by_view(project: Project, keyed: Keyed, table: SampleTable) -> list[np.ndarray]:
    """Return the rows that are wanted in each view: all in the plain one where there is no other."""
    if len(project.views) == 1:
        return [keyed.good]
    plain, augmented = map(keyed.meant, rows_by_view(keyed.keys, table))
    return [plain, *[augmented] * (len(project.views) - 1)]


def _table(source: Source, keyed: Keyed, project: Project) -> SampleTable:
    """Return the sample table of the rows that are good."""
    good = keyed.good
    return build(source, keyed.keys[good], project.data, rows=good)


def _open_or_replace(path: Path, recipe: Recipe, remote: Remote | None) -> Store:
    """Open the store at `path`; one of another recipe is made anew, for its states are of no use to these settings.

    Raises:
        StaleStoreError: one of another recipe lies elsewhere, where others may be using it.
    """
    if remote is None:
        (path / ELSEWHERE).unlink(missing_ok=True)  # from here on it lies here
    try:
        return Store.create(path, recipe, remote)
    except StaleStoreError as stale:
        if remote is not None:
            raise StaleStoreError(f"{stale}; others may use that store, so it stays: change encode.store") from None
        log.warning("%s; encoding anew", stale)
        remove(path)
        return Store.create(path, recipe)


def _open_loaders(towers: Sequence[Tower], table: SampleTable, device: torch.device) -> tuple[Batches, Batches]:
    if len(towers) > 1:
        return open_joint_loaders(towers, table, device)
    return open_loaders(towers[0].bench, table, towers[0].store, device)


def _frozen_cost(towers: Sequence[Tower], device: torch.device) -> float:
    """Seconds per sample of the prefixes on training batches: what they cost at every epoch where nothing is kept."""
    total = 0.0
    for tower in towers:
        if tower.prefix.cut.share > 0:
            tower.bench.backbone.model.to(device)
            rows = tower.table.rows("train")
            inputs = tower.bench.stored_inputs(tower.store, tower.table, rows[: tower.bench.project.train.batch_size])
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            total += seconds_per_sample(tower.prefix, inputs) * len(rows)
    return total / sum(len(tower.table.rows("train")) for tower in towers)


def _leave_word(project: Project, stores: Sequence[Store]) -> None:
    """Write what identifies stores that lie elsewhere where they would lie here: by it DVC sees changes."""
    if project.remote is None:
        return
    for store in stores:
        segments = store.segments()
        word = {"recipe": store.recipe.digest, "segments": len(segments), "digest": digest(segments)}
        place = project.activations / store.path.relative_to(project.remote.mirror) / ELSEWHERE
        write_whole(place, json.dumps(word, indent=2) + "\n")


def _tell(project: Project, stores: Sequence[Sequence[Store]], done: Encoded) -> None:
    """Say what was encoded and cut off."""
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


def _tell_of_bad(project: Project, bad: Sequence[BadSample], total: int) -> bool:
    """Say what was set aside; return whether no more of `total` samples is bad than allowed."""
    allowed = project.encode.tolerated(total)
    if bad:
        log.warning("%d bad samples set aside in %s: %s", len(bad), project.quarantine, quarantine.summary(bad))
    if len(bad) > allowed:
        log.error(
            "%d bad samples, encode.max_bad allows %d of %d; mend or remove them, or raise it", len(bad), allowed, total
        )
    return len(bad) <= allowed
