"""Train: store + sample table -> batches -> suffix -> a finished run."""

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from pipeline.data import SampleTable
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
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
from pipeline.runs.record import Run
from pipeline.train.checkpoint import exclusive_checkpoint
from pipeline.train.fit import TrainResult, fit, open_accelerator
from pipeline.train.loader import Loader
from pipeline.train.objective import evaluate, to_device
from pipeline.train.trackers import tracked

log = logging.getLogger("recycle")

LOGS = "logs"
"""Folder in `work_dir` with the local files of experiment trackers."""


def train_project(project: Project, cut_name: str, name: str | None = None) -> Run:
    """Fine-tune the suffix of one cut from its store, without reading the raw data; return the run, called `name`.

    Where the weights that params.yaml names are not on this machine, the pretrained suffix in the store is used. With
    several processes, each runs this function on its share of the samples, and the main one writes.
    """
    cut = project.cut(cut_name)
    name = name or record.run_name(project, cut)
    out = project.run_path(name)
    accelerator = open_accelerator(project.train, project.work_dir / LOGS / name)
    set_seed(project.train.seed, device_specific=True)  # dropout differs between processes
    table = project.training_table()
    towers = [open_tower(part, cut, table, suffix_only=True) for part in project.parts]
    stores = [store for tower in towers for store in tower.store.stores]
    provenance = record.provenance(project, cut, stores)
    identity = record.identity(provenance)
    owner = project.params.absolute().parent.name
    with (
        exclusive_checkpoint(project.work_dir / "checkpoints" / identity) as checkpoint,
        tracked(accelerator, owner, name, record.sections(project)),
    ):
        summary = _train(project, table, towers, accelerator, out, checkpoint)
    run = Run(
        name=name,
        cut=cut,
        overrides=project.overrides,
        identity=identity,
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
        made_of=provenance,
        test=summary.test,
    )
    if accelerator.is_main_process:
        record.write_run(project, run)
    log.info("run %s: %s %.3f after epoch %d", name, summary.metric, summary.value, summary.best_epoch)
    if run.test:
        log.info("run %s: test %s", name, ", ".join(f"{score} {value:.3f}" for score, value in run.test.items()))
    return run


def _train(
    project: Project,
    table: SampleTable,
    towers: Sequence[Tower],
    accelerator: Accelerator,
    out: Path,
    checkpoint: Path,
) -> TrainResult:
    """Train the suffixes of `towers`; write the result to the folder `out`."""
    suffix = trainable_model(towers)
    if project.train.channels_last:
        suffix.to(memory_format=torch.channels_last)
    minimum = minimum_units(towers, suffix, table, accelerator.device)
    training, validation, test = open_loaders(towers, table, accelerator.device, minimum=minimum)
    if accelerator.is_main_process:
        shutil.rmtree(out, ignore_errors=True)
    else:
        for tower in towers:
            tower.loaded.backbone.model.to("meta")  # the suffix has its own weights, the main process keeps the others
    return fit(
        suffix,
        towers[0].loaded.task,
        training,
        validation,
        project.train,
        out=out,
        checkpoint=checkpoint,
        accelerator=accelerator,
        fresh=new_parameters(towers),
        weights=plain_weights if project.train.adapter else nn.Module.state_dict,
        test=partial(_test_scores, towers, test, accelerator),
    )


def _test_scores(
    towers: Sequence[Tower], test: Loader | TowerLoader, accelerator: Accelerator, weights: Path
) -> dict[str, float]:
    """Return the scores of the `weights` of a run on the test samples; empty without any."""
    if not len(test):
        return {}
    for tower in towers:
        load_weights(tower, weights)
        to_device(tower.suffix, accelerator.device)
    return evaluate(plain_model(towers), towers[0].loaded.task, test, accelerator)
