"""Flow 2: store + sample table -> order -> loader -> suffix -> loss -> metrics.

`fit` takes iterables of batches, not a store: the loop knows nothing of where states come from. `accelerate` drives
device, precision and checkpoints; a killed run goes on from its last whole epoch and ends with the weights it would
have had. Of several processes each runs it, and the main one writes.
"""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from pipeline.errors import ConfigError, TrainError
from pipeline.tasks import Task
from pipeline.train import processes
from pipeline.train.checkpoint import resume, save
from pipeline.train.config import TrainConfig
from pipeline.train.loader import Batch
from pipeline.train.objective import Objective, evaluate
from pipeline.train.optimizer import parameter_groups, schedule
from pipeline.train.parallel import prepare
from pipeline.train.run_log import RunLog

log = logging.getLogger("recycle")


@dataclass
class Summary:
    """What a finished run reports."""

    metric: str
    """Name of the task's leading validation metric."""
    value: float
    """That metric for the weights the run ended with."""
    initial: float
    """That metric before any training: what the pretrained network does by itself."""
    best_epoch: int
    """Epoch these weights come from, counted from 1."""
    train_seconds_per_epoch: float
    """Median over the epochs; validation and checkpoints are not in it."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Per epoch: training loss, validation metrics, seconds."""


class Batches(Iterable[Batch], Sized, Protocol):
    """Batches of one epoch, the same number every epoch; `set_epoch` chooses the order."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Return what drives device, precision and processes.

    A batch is shared out among processes (`split_batches`), so that a schedule has as many steps as of one.

    Raises:
        ConfigError: there are more processes than units in a step, or the CPU cannot compute in `config.precision`.
    """
    if config.precision == "fp16" and processes.state().device.type == "cpu":
        raise ConfigError("train.precision is fp16, which the CPU does not train in; set bf16 or no")
    accelerator = Accelerator(
        cpu=processes.state().device.type == "cpu",
        mixed_precision=config.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if config.batch_size < accelerator.num_processes:
        raise ConfigError(
            f"train.batch_size is {config.batch_size}, and {accelerator.num_processes} processes share it out; raise "
            "it, or start fewer"
        )
    return accelerator


def fit(
    suffix: nn.Module,
    task: Task,
    training: Batches,
    validation: Batches,
    config: TrainConfig,
    *,
    out: Path,
    checkpoint: Path,
    accelerator: Accelerator,
    fresh: frozenset[str] = frozenset(),
    weights: Callable[[nn.Module], dict[str, Tensor]] = nn.Module.state_dict,
) -> Summary:
    """Train `suffix` and leave its weights in `out/model.safetensors`, its curves beside them.

    A run that was killed is continued from `checkpoint`, the folder of this run and no other; it is removed at the end.
    `fresh` names the suffix's parameters that were not pretrained; `weights` returns what is kept of a suffix.
    """
    writes = accelerator.is_main_process
    objective = Objective(suffix, task)
    model = prepare(objective, training, accelerator)
    optimizer = torch.optim.AdamW(parameter_groups(objective, config, fresh))  # of the parameters that moving left
    scheduler = schedule(optimizer, config, steps=config.epochs * -(-len(training) // config.gradient_accumulation))
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    progress = resume(accelerator, checkpoint)
    if progress.epoch:
        log.info("goes on from epoch %d of %d, checkpoint %s", progress.epoch + 1, config.epochs, checkpoint)
    if progress.initial is None:
        progress.initial = evaluate(suffix, task, validation, accelerator)[task.monitor]
    with RunLog(out) if writes else nullcontext() as live:
        if live:
            for row in progress.history:
                live.log_epoch(row)
        while not progress.exhausted(config.epochs, config.patience):
            training.set_epoch(progress.epoch)
            start = time.perf_counter()
            loss = train_epoch(model, training, optimizer, scheduler, accelerator, config, progress.epoch)
            seconds = time.perf_counter() - start
            metrics = evaluate(suffix, task, validation, accelerator)
            row = {"train/loss": loss, "train/seconds": seconds} | {f"validation/{k}": v for k, v in metrics.items()}
            better = progress.take(row, metrics[task.monitor], higher=task.higher_is_better)
            if live:
                live.log_epoch(row)
            save(accelerator, weights(suffix) if writes else {}, checkpoint, progress, better=better)
    best = config.keep == "best"
    if writes:
        shutil.copyfile(checkpoint / ("best.safetensors" if best else "last.safetensors"), out / "model.safetensors")
        shutil.rmtree(checkpoint)
    epoch = progress.best_epoch if best else progress.epoch
    return Summary(
        metric=task.monitor,
        value=progress.history[epoch - 1][f"validation/{task.monitor}"],
        initial=progress.initial,
        best_epoch=epoch,
        train_seconds_per_epoch=statistics.median(row["train/seconds"] for row in progress.history),
        history=progress.history,
    )


def train_epoch(
    objective: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    config: TrainConfig,
    epoch: int,
) -> float:
    """Train on the batches of one epoch; return their mean loss.

    Raises:
        TrainError: the loss is not finite.
    """
    objective.train()
    total, count = torch.zeros((), device=accelerator.device), 0
    label = f"epoch {epoch + 1}/{config.epochs}"
    hidden = None if accelerator.is_main_process else True
    for batch in tqdm(batches, desc=label, unit="batch", disable=hidden, leave=False):
        count += 1
        if count == len(batches):  # the epoch ends with a step: what a killed run goes on from has no gradients
            accelerator.step = config.gradient_accumulation - 1
        with accelerator.accumulate(objective):
            with accelerator.autocast():
                loss = objective(batch)
            accelerator.backward(loss)
            if config.max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        total += loss.detach()
    mean = float(total) / count
    if not math.isfinite(mean):
        raise TrainError(
            f"the training loss is {mean} in epoch {epoch + 1}; lower train.lr (now {config.lr}) "
            "or set train.max_grad_norm"
        )
    return mean
