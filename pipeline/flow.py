"""The three stages of dvc.yaml, told from top to bottom: encode, train, report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from pipeline.data import SampleTable, remarks, rows_in_role
from pipeline.encode import quarantine
from pipeline.encode.quarantine import BadSample
from pipeline.epochs import open_joint_loaders, open_loaders
from pipeline.fill import fill, leave_word, sample_table, tell
from pipeline.project import Project
from pipeline.project.smallest import least_units
from pipeline.project.towers import Tower, fresh, joined, open_tower, plain_weights
from pipeline.report import runs
from pipeline.report.costs import read_costs, write_costs
from pipeline.report.summary import Row, Run, curves, plot, summarise
from pipeline.train.checkpoint import alone
from pipeline.train.flow import Batches, Summary, fit, open_accelerator

log = logging.getLogger("recycle")


def encode_project(project: Project, *, rehash: bool = False, replace_stores: bool = False) -> bool:
    """Bring every sample into the store of every cut; write the sample table, the samples set aside and the costs.

    Files that did not change are not read, and where nothing is to do no model is built; `rehash` distrusts what was
    known of both. Returns whether the bad samples stay within `encode.max_bad`.

    Raises:
        StaleStoreError: there are stores of another recipe, and neither `replace_stores` nor `encode.replace` allows to
            remove them.
    """
    replace_stores = replace_stores or project.encode.replace
    source = project.source()
    if left_out := source.left_out():
        log.warning("left out of the data set: %s", left_out)
    keyed = project.keys_of(source, trust=not rehash)
    if not len(keyed.good):
        quarantine.write(project.quarantine, keyed.bad, keyed.keys)  # the table will say that nothing is left
    table, bad, made = sample_table(project, source, keyed), keyed.bad, []
    for part in project.parts:
        rows = None if part.tower is None else rows_in_role(source, keyed.good, part.tower)
        own = replace(keyed, bad=bad, rows=rows)
        made.append(fill(part, source, own, table, rehash=rehash, replace_stores=replace_stores))
        bad = made[-1].done.keyed.bad
    if len(bad) > len(keyed.bad):
        table = sample_table(project, source, replace(keyed, bad=bad))
    for remark in remarks(table):
        log.warning("%s", remark)
    if lost := len(keyed.keys) - len(bad) - len(table):
        log.warning("%d samples left out: the other half of their pair is set aside", lost)
    replace(table, views=project.encode.views).write(project.samples)
    quarantine.write(project.quarantine, bad, keyed.keys)
    write_costs(project, made)
    for one in made:
        leave_word(one)
    for one in made:
        tell(one)
    return _tell_of_bad(project, bad, len(keyed.keys))


def train_project(project: Project, cut_name: str, name: str | None = None) -> Run:
    """Fine-tune the suffix of one cut from its store; the raw data is not read. The run is called `name`.

    Where the weights that params.yaml names are not on this machine, those that the store carries do. Where several
    processes were started, each runs this with its share of the samples, and the main one writes.
    """
    cut = project.cut(cut_name)
    name = name or runs.run_name(project, cut)
    out = project.run_path(name)
    accelerator = open_accelerator(project.train)
    set_seed(project.train.seed, device_specific=True)  # no process drops what another one does
    table = SampleTable.read(project.samples).share(
        project.data.fraction, project.data.seed, by_label=project.task.kind != "regression"
    )
    towers = [open_tower(part, cut, table, to_train=True) for part in project.parts]
    made_of = runs.made_of(project, cut)
    identity = runs.identity(made_of)
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
        history=summary.history,
        legend=towers[0].bench.task.legend(table),
        made_of=made_of,
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
    least = least_units(towers, suffix, table, accelerator.device)
    training, validation = _open_loaders(towers, table, accelerator.device, least)
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
    """Write the result table, the curves and the plot of the finished runs that hold; name those that are left out.

    Raises:
        DataError: none holds.
    """
    costs, finished = read_costs(project), runs.current(project)
    rows = summarise(finished, costs)
    (project.results / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    curves(finished, costs).to_csv(project.results / "curves.csv", index=False)
    plot(finished, costs, project.results / "runs.png")
    return rows


def _open_loaders(
    towers: Sequence[Tower], table: SampleTable, device: torch.device, least: int
) -> tuple[Batches, Batches]:
    if len(towers) > 1:
        return open_joint_loaders(towers, table, device, least=least)
    return open_loaders(towers[0].bench, table, towers[0].store, device, least=least)


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
