"""Train: store + sample table -> batches -> suffix -> a finished run."""

import logging
import shutil
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from pipeline.data import SampleTable
from pipeline.project import CutName, Project
from pipeline.project.loaders import Feed, open_feeds, open_loaders
from pipeline.project.minimum_batch import minimum_units
from pipeline.project.towers import (
    Tower,
    TowerLoader,
    load_weights,
    new_parameters,
    open_tower,
    plain_model,
    plain_weights,
    trainable_model,
)
from pipeline.runs import record
from pipeline.runs.planned import PlannedRun
from pipeline.runs.record import Run
from pipeline.runs.reference import compute_reference, write_reference
from pipeline.store import Store
from pipeline.tasks import open_task
from pipeline.train import processes
from pipeline.train.checkpoint import exclusive_checkpoint
from pipeline.train.config import TrainConfig
from pipeline.train.fit import TrainResult, fit, open_accelerator
from pipeline.train.loader import Loader
from pipeline.train.objective import evaluate, to_device
from pipeline.train.stacked import StackedRun, fit_stacked
from pipeline.train.trackers import tracked

log = logging.getLogger("recycle")

LOGS = "logs"
"""Folder in `work_dir` with the local files of experiment trackers."""


def train_project(project: Project, cut_name: str, name: str | None = None) -> Run:
    """Fine-tune the suffix of one cut from its store, without reading the raw data; return the run, called `name`.

    With several processes, each runs this function on its share of the samples, and the main one writes.
    """
    cut = project.cut(cut_name)
    name = name or record.run_name(project, cut)
    accelerator = open_run_accelerator(project, name)
    opened = OpenCut.of(project, cut)
    run = PlannedRun(project, cut, name, record.provenance(project, cut, opened.stores))
    with exclusive_checkpoint(run.checkpoint):
        return train_opened(run, opened, accelerator)


def open_run_accelerator(project: Project, name: str) -> Accelerator:
    """Return the accelerator of the run `name`; raises ConfigError as `open_accelerator` and `run_path`."""
    project.run_path(name)
    return open_accelerator(project.train, project.work_dir / LOGS / name)


@dataclass(frozen=True)
class OpenCut:
    """A cut opened for training: the samples and stores, and the model split there, as they are before any run."""

    cut: CutName
    table: SampleTable
    towers: Sequence[Tower]
    feeds: Mapping[str, Feed]
    """What reads the states, by tower."""
    trains_on_one: MutableMapping[nn.Module, bool] = field(default_factory=WeakKeyDictionary)
    """Suffix -> whether it trains on a single sample; runs of the cut share a suffix, and so the answer."""
    sample: np.ndarray | None = None
    """Rows of the table that the towers are opened on, (n,) int64, ascending; None is all."""

    @classmethod
    def of(cls, project: Project, cut: CutName, sample: np.ndarray | None = None) -> "OpenCut":
        """Open `cut`, or only `sample` of its table; raises as `open_tower` and `open_feeds`."""
        table = project.training_table()
        towers = [open_tower(part, cut, table, suffix_only=True, sample=sample) for part in project.parts]
        if project.train.adapter is None:
            for tower in towers:
                _convert(tower.suffix, project.train)
        return cls(cut, table, towers, open_feeds(towers, processes.state().device), sample=sample)

    @property
    def stores(self) -> list[Store]:
        """The stores of all encoders and views."""
        return [store for tower in self.towers for store in tower.store.stores]

    def towers_for(self, project: Project) -> list[Tower]:
        """Return the towers for a run of `project`: the same suffixes, and new tasks, whose losses are untrained."""
        return [_for_run(tower, part) for tower, part in zip(self.towers, project.parts, strict=True)]


def _convert(suffix: nn.Module, train: TrainConfig) -> None:
    if train.channels_last:
        suffix.to(memory_format=torch.channels_last)
    if train.dtype != "float32":
        suffix.to(getattr(torch, train.dtype))


def _for_run(tower: Tower, project: Project) -> Tower:
    task = open_task(project.task)
    task.head(tower.table)
    task = task.of_width(tower.loaded.backbone.width)
    return replace(tower, loaded=replace(tower.loaded, project=project, task=task))


def train_opened(planned: PlannedRun, opened: OpenCut, accelerator: Accelerator) -> Run:
    """Train a run whose cut is open, and whose checkpoint folder this process has locked; return the finished run.

    The suffixes in `opened` are trained in place.
    """
    project, table, name = planned.project, opened.table, planned.name
    set_seed(project.train.seed, device_specific=True)  # dropout differs between processes
    towers = opened.towers_for(project)
    owner = project.params.absolute().parent.name
    with tracked(accelerator, owner, name, record.sections(project)):
        summary, review = _train(planned, opened, towers, accelerator)
    run = Run(
        name=name,
        cut=planned.cut,
        overrides=project.overrides,
        identity=planned.identity,
        settings=record.settings(project, table),
        recycled=min(tower.suffix.cut.share for tower in towers),
        metric=summary.metric,
        value=summary.value,
        initial=summary.initial,
        best_epoch=summary.best_epoch,
        train_samples=len(table.rows("train")),
        train_seconds_per_epoch=summary.train_seconds_per_epoch,
        history=summary.history,
        legend=towers[0].loaded.task.legend(table),
        made_of=planned.made_of,
        test=summary.test,
        review=review,
    )
    if accelerator.is_main_process:
        record.write_run(project, run)
        shutil.rmtree(planned.checkpoint)  # last, with the lock: see claimed_checkpoint
    log.info("run %s: %s %.3f after epoch %d", name, summary.metric, summary.value, summary.best_epoch)
    chance = towers[0].loaded.task.chance(table)
    if chance is not None and run.value <= chance:
        log.warning(
            "run %s has learned nothing: always the most frequent label scores %.3f; try another train.lr, more epochs "
            "or another cut",
            name,
            chance,
        )
    if run.test:
        log.info("run %s: test %s", name, ", ".join(f"{score} {value:.3f}" for score, value in run.test.items()))
    return run


def _train(
    run: PlannedRun, opened: OpenCut, towers: Sequence[Tower], accelerator: Accelerator
) -> tuple[TrainResult, dict[str, Any]]:
    """Train the suffixes of `towers`; write the result to the folder of the run, and return it with its review."""
    train = run.project.train
    suffix, (training, validation, test) = open_suffix(opened, towers, train, accelerator.device)
    if train.compile:
        suffix.compile()
    task = towers[0].loaded.task
    if accelerator.is_main_process:
        shutil.rmtree(run.folder, ignore_errors=True)
        if task.reference is not None:
            write_reference(run.folder, opened.table.keys, task.reference)
    else:
        for tower in towers:
            tower.loaded.backbone.model.to("meta")  # the suffix has its own weights, the main process keeps the others
    result = fit(
        suffix,
        task,
        training,
        validation,
        train,
        out=run.folder,
        checkpoint=run.checkpoint,
        accelerator=accelerator,
        fresh=new_parameters(towers),
        weights=plain_weights if train.adapter else nn.Module.state_dict,
        test=partial(_test_scores, towers, test, accelerator),
    )
    collector = task.review(opened.table)
    if collector is None:
        return result, {}
    return result, evaluate(
        _kept(towers, run.folder / record.WEIGHTS, accelerator), task, validation, accelerator, collector
    )


def open_suffix(
    opened: OpenCut, towers: Sequence[Tower], train: TrainConfig, device: torch.device
) -> tuple[nn.Module, list[Loader | TowerLoader]]:
    """Return the model to train, and the loaders of the training, the validation and the test samples."""
    suffix = trainable_model(towers)
    if train.adapter is not None:  # an adapted suffix is a new one
        _convert(suffix, train)
    return suffix, _open_batches(opened, towers, suffix, device)


def _open_batches(
    opened: OpenCut, towers: Sequence[Tower], suffix: nn.Module, device: torch.device
) -> list[Loader | TowerLoader]:
    first = towers[0]
    if first.loaded.task.needs_reference:
        rows, reference = first.rows, np.full(len(opened.table), np.nan, np.float32)
        reference[rows if opened.sample is None else opened.sample[rows]] = compute_reference(first, suffix, device)
        first.loaded.task.reference = reference
    table = opened.table if opened.sample is None else opened.table.of(opened.sample)
    minimum = minimum_units(towers, suffix, table, device, opened.trains_on_one)
    return open_loaders(towers, opened.table, device, minimum=minimum, feeds=opened.feeds, sample=opened.sample)


def train_stack(runs: Sequence[PlannedRun], opened: OpenCut) -> dict[str, str]:
    """Train `runs` at once, so that `train_opened` has only to record them; return messages of those that failed.

    They differ in `stacked.FREE` only; this process has locked their checkpoint folders.

    Raises:
        TrainError: they cannot be trained at once; the message is the reason.
    """
    runs = sorted(runs, key=lambda run: run.project.train.seed)
    device, by_seed = processes.state().device, {run.project.train.seed: run for run in runs}
    towers = {seed: opened.towers_for(run.project) for seed, run in by_seed.items()}
    first = towers[runs[0].project.train.seed]
    suffix = trainable_model(first)
    loaders = {seed: _open_batches(opened, own, suffix, device) for seed, own in towers.items()}
    failed = fit_stacked(
        suffix,
        first[0].loaded.task,
        [StackedRun(run.project.train, loaders[run.project.train.seed][0], run.checkpoint) for run in runs],
        loaders[runs[0].project.train.seed][1],
        device=device,
        fresh=new_parameters(first),
    )
    return {run.name: message for run, message in zip(runs, failed, strict=True) if message is not None}


def _test_scores(
    towers: Sequence[Tower], test: Loader | TowerLoader, accelerator: Accelerator, weights: Path
) -> dict[str, float]:
    """Return the scores of the `weights` of a run on the test samples; empty without any."""
    if not len(test):
        return {}
    return evaluate(_kept(towers, weights, accelerator), towers[0].loaded.task, test, accelerator)


def _kept(towers: Sequence[Tower], weights: Path, accelerator: Accelerator) -> nn.Module:
    """Return the model of `towers` with the `weights` that a run keeps, on its device."""
    for tower in towers:
        load_weights(tower, weights)
        to_device(tower.suffix, accelerator.device)
    return plain_model(towers)
