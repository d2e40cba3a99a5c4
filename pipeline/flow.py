"""The three stages of dvc.yaml, told from top to bottom: encode, train, report."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from pipeline import order
from pipeline.adapter import merged
from pipeline.data import SampleTable, Source, build, open_source
from pipeline.encode import encode
from pipeline.encoder import Encoded
from pipeline.errors import DataError, StaleStoreError
from pipeline.feed import BadSample, Keyed, decode_samples, key_contents
from pipeline.files import sha256
from pipeline.keys import Recipe, digest
from pipeline.loader import Loader, place
from pipeline.project import CutName, Project, Workbench, pick_device
from pipeline.ragged import pad_batch
from pipeline.report import Cost, Row, Run, curves, plot, summarise
from pipeline.split import Cut, Prefix, Suffix
from pipeline.store import Store
from pipeline.timing import seconds_per_sample
from pipeline.train import fit
from pipeline.views import Views, rows_by_view

log = logging.getLogger("recycle")


def encode_project(project: Project) -> bool:
    """Bring every sample into the store of every cut; write the sample table, the samples set aside and the costs.

    Returns whether the bad samples stay within `encode.max_bad`.
    """
    source = open_source(project.data)
    keyed = key_contents(source, workers=project.encode.workers or 1)
    table = build(source, keyed.keys[keyed.good], project.data, rows=keyed.good)
    bench = Workbench.open(project, table)
    bench.backbone.model.to(pick_device(project.encode.device))
    if project.encode.channels_last:
        bench.backbone.model.to(memory_format=torch.channels_last)
    example = _example_of_source(bench, source, keyed)
    prefixes = [bench.split(cut, example)[0] for cut in project.encode.cuts]
    _tell_of_one_place_twice(project.encode.cuts, prefixes)
    by_view = zip(*map(bench.recipes, prefixes), strict=True)
    stores = [
        [
            _open_or_replace(project.store_path(cut, view), recipe)
            for cut, recipe in zip(project.encode.cuts, recipes, strict=True)
        ]
        for view, recipes in zip(project.views, by_view, strict=True)
    ]
    done, table = _encode_views(bench, source, keyed, prefixes, stores)
    table.write(project.samples)
    _write_quarantine(project.quarantine, done.bad)
    _write_costs(project, prefixes, stores, done)
    return _tell(project, stores, done, len(source))


def train_project(project: Project, name: str) -> Run:
    """Fine-tune the suffix of one cut from its store; the raw data is not read."""
    cut = project.cut(name)
    set_seed(project.train.seed)
    accelerator = Accelerator(
        mixed_precision=project.train.precision, gradient_accumulation_steps=project.train.gradient_accumulation
    )
    table = SampleTable.read(project.samples)
    bench = Workbench.open(project, table)
    views, prefix, suffix = bench.open_store(cut, table)
    suffix = bench.adapt(views, table, prefix, suffix)
    load = partial(
        Loader,
        views,
        table.keys,
        bench.task.prepare(table),
        pad=bench.backbone.preprocess.pad,
        device=accelerator.device,
        source=place(views, table.keys, accelerator.device),
    )
    training = load(_order(bench, table, "train"), view=_view_order(project, views, len(table)))
    validation = load(_order(bench, table, "validation"))
    run = project.run_path(cut)
    shutil.rmtree(run, ignore_errors=True)
    settings = [section.model_dump(mode="json") for section in (project.model, project.task, project.train)]
    identity = digest([*(store.recipe.digest for store in views.stores), sha256(project.samples), *settings])
    summary = fit(
        suffix,
        bench.task,
        training,
        validation,
        project.train,
        out=run,
        checkpoint=project.scratch / "checkpoints" / identity,
        accelerator=accelerator,
        fresh=bench.backbone.fresh,
        weights=merged if project.train.adapter else Suffix.state_dict,
    )
    finished = Run(
        cut=cut,
        recycled=prefix.cut.share,
        metric=summary.metric,
        value=summary.value,
        initial=summary.initial,
        best_epoch=summary.best_epoch,
        train_samples=len(table.rows("train")),
        train_seconds_per_epoch=summary.train_seconds_per_epoch,
        frozen_seconds_per_sample=_frozen_cost(prefix, bench, views, table, accelerator.device),
        history=summary.history,
    )
    (run / "run.json").write_text(json.dumps(asdict(finished), indent=2) + "\n")
    log.info("cut %s: %s %.3f after epoch %d", cut, summary.metric, summary.value, summary.best_epoch)
    return finished


def report_project(project: Project) -> list[Row]:
    """Write the result table, the curves and the plot of all finished runs."""
    costs = _read_costs(project)
    runs = []
    for cut in project.encode.cuts:
        file = project.run_path(cut) / "run.json"
        if not file.exists():
            raise DataError(f"cut {cut}: {file} does not exist; train it (dvc repro train)")
        runs.append(Run(**json.loads(file.read_text())))
    rows = summarise(runs, costs)
    (project.results / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    curves(runs, costs).to_csv(project.results / "curves.csv", index=False)
    plot(runs, costs, project.results / "accuracy.png")
    return rows


def _example_of_source(bench: Workbench, source: Source, keyed: Keyed) -> dict[str, Tensor]:
    """The shortest and the longest samples: the batch on which a split is proved."""
    preprocess = bench.backbone.preprocess
    for rows in (keyed.extremes(), keyed.good[:64]):
        samples = decode_samples(source, preprocess, rows)
        if samples:
            samples = [samples[0], samples[-1]] if len(samples) > 1 else samples * 2
            device = next(bench.backbone.model.parameters()).device
            return {name: tensor.to(device) for name, tensor in pad_batch(samples, preprocess.pad).items()}
    raise DataError("none of the first 64 samples can be decoded; see what data.path and data.source say")


def _tell_of_one_place_twice(names: Sequence[CutName], prefixes: Sequence[Prefix]) -> None:
    """Warn: in a shallow network several shares may fall on one block boundary. Each has its store all the same."""
    known: dict[Cut, CutName] = {}
    for name, prefix in zip(names, prefixes, strict=True):
        if prefix.cut in known:
            log.warning(
                "encode.cuts has %r and %r, which name one place: %s; keep one", known[prefix.cut], name, prefix.cut
            )
        known[prefix.cut] = name


def _encode_views(
    bench: Workbench, source: Source, keyed: Keyed, prefixes: Sequence[Prefix], stores: Sequence[Sequence[Store]]
) -> tuple[Encoded, SampleTable]:
    """Fill the stores, `stores[view][cut]`; return what was done, and the sample table of what is in them.

    Where there are augmented views, a sample that turns out bad can move others to another split (the rest of its
    group, say): then what these lack where they are now is encoded too.
    """
    project = bench.project
    views = [bench.preprocess(view) for view in project.views]
    done, found = Encoded.begun(keyed, len(prefixes)), -1
    while found != len(done.bad):
        found = len(done.bad)
        table = build(source, keyed.keys[done.good], project.data, rows=done.good)
        if len(views) == 1:
            encode(source, keyed, views, prefixes, stores, project.encode, done=done)
        else:
            plain, augmented = rows_by_view(keyed.keys, table)
            encode(source, keyed, views[:1], prefixes, stores[:1], project.encode, rows=plain, done=done)
            encode(source, keyed, views[1:], prefixes, stores[1:], project.encode, rows=augmented, done=done)
    return done, table


def _open_or_replace(path: Path, recipe: Recipe) -> Store:
    """Open the store at `path`; one of another recipe is made anew, for its states are of no use to these settings."""
    try:
        return Store.create(path, recipe)
    except StaleStoreError as stale:
        log.warning("%s; encoding anew", stale)
        shutil.rmtree(path)
        return Store.create(path, recipe)


def _order(bench: Workbench, table: SampleTable, part: str) -> Callable[[int], list[np.ndarray]]:
    """Return the batches of a split as a function of the epoch; only training samples are shuffled."""
    config = bench.project.train

    def batches(epoch: int) -> list[np.ndarray]:
        units = bench.task.units(table, part, seed=config.seed, epoch=epoch)
        return order.batches(units, config.batch_size, seed=config.seed, epoch=epoch, shuffle=part == "train")

    return batches


def _view_order(project: Project, views: Views, rows: int) -> Callable[[int], np.ndarray]:
    """Return which view of each row is trained on, as a function of the epoch."""
    config = project.train
    return lambda epoch: order.views(rows, views.count, seed=config.seed, epoch=epoch, how=config.views)


def _frozen_cost(prefix: Prefix, bench: Workbench, views: Views, table: SampleTable, device: torch.device) -> float:
    """Seconds per sample of the prefix on a training batch: what it costs at every epoch where nothing is kept."""
    if prefix.cut.share == 0:
        return 0.0
    bench.backbone.model.to(device)
    inputs = bench.stored_inputs(views, table, table.rows("train")[: bench.project.train.batch_size])
    return seconds_per_sample(prefix, {name: tensor.to(device) for name, tensor in inputs.items()})


def _write_quarantine(path: Path, bad: Sequence[BadSample]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "source", "reason"])
        writer.writerows([sample.row, sample.source, sample.reason] for sample in sorted(bad, key=lambda s: s.row))


def _write_costs(
    project: Project, prefixes: Sequence[Prefix], stores: Sequence[Sequence[Store]], done: Encoded
) -> None:
    """Write results/encode.json. Of all runs under a recipe, the one that encoded most says what a state costs.

    A sample has one state, or several where there are augmented views; all of them count.
    """
    path = project.results / "encode.json"
    before: dict[str, Any] = json.loads(path.read_text())["cuts"] if path.exists() else {}
    cuts = {}
    for number, (cut, prefix, *by_view) in enumerate(zip(project.encode.cuts, prefixes, *stores, strict=True)):
        keys = np.concatenate([store.keys() for store in by_view])
        samples = len(np.unique(keys, axis=0))
        training = (by_view[1:] or by_view)[0]
        measured = {"recipe": training.recipe.digest, **done.costs.of(number)}
        known = before.get(str(cut), {}).get("measured", measured)
        if known["recipe"] == measured["recipe"] and known["samples"] > measured["samples"]:
            measured = known
        cuts[str(cut)] = {
            "at": str(prefix.cut),
            "samples": samples,
            "state_bytes_per_sample": sum(store.nbytes() for store in by_view) / max(1, samples),
            "encode_seconds": sum(measured["seconds_per_sample"].values()) * len(keys) if measured["samples"] else None,
            "measured": measured,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bad": len(done.bad), "cuts": cuts}, indent=2) + "\n")


def _read_costs(project: Project) -> dict[str, Cost]:
    path = project.results / "encode.json"
    if not path.exists():
        raise DataError(f"{path} does not exist; encode first (dvc repro encode)")
    cuts: dict[str, Any] = json.loads(path.read_text())["cuts"]
    return {name: Cost(cut["state_bytes_per_sample"], cut["encode_seconds"]) for name, cut in cuts.items()}


def _tell(project: Project, stores: Sequence[Sequence[Store]], done: Encoded, total: int) -> bool:
    for cut, new, promoted, *by_view in zip(project.encode.cuts, done.new, done.promoted, *stores, strict=True):
        there = sum(len(store.keys()) for store in by_view) - new
        log.info("cut %s: %d samples encoded, %d were there", cut, new, there)
        if promoted:
            log.info("cut %s: beyond float16, stored in a wider type: %s", cut, ", ".join(sorted(promoted)))
    allowed = project.encode.max_bad if project.encode.max_bad >= 1 else int(project.encode.max_bad * total)
    if done.bad:
        first = done.bad[0]
        log.warning(
            "%d bad samples set aside in %s (%s: %s)", len(done.bad), project.quarantine, first.source, first.reason
        )
    if len(done.bad) > allowed:
        log.error(
            "%d bad samples, encode.max_bad allows %d of %d; mend or remove them, or raise it",
            len(done.bad),
            allowed,
            total,
        )
    return len(done.bad) <= allowed
