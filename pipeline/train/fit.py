"""The inner flow of train: batches -> suffix -> loss -> optimizer -> metrics, epoch by epoch.

`fit` takes iterables of batches, not a store. `accelerate` drives device, precision and checkpoints; a killed run
resumes after its last complete epoch and ends with the weights of an uninterrupted run. Every process of a run calls
`fit`; the main one writes.
"""

import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from pipeline.errors import ConfigError, TrainError
from pipeline.tasks import Task
from pipeline.train import processes
from pipeline.train.checkpoint import Progress, resume, save
from pipeline.train.config import TrainConfig
from pipeline.train.loader import Batch
from pipeline.train.objective import Objective, evaluate, prepare
from pipeline.train.run_log import RunLog

log = logging.getLogger("recycle")


@dataclass
class TrainResult:
    """The result of a training run."""

    metric: str
    """Name of the validation metric that selects the best epoch."""
    value: float
    """Its value for the weights that the run keeps."""
    initial: float
    """Its value before training."""
    best_epoch: int
    """Epoch these weights come from, counted from 1."""
    train_seconds_per_epoch: float
    """Median over the epochs, without validation and checkpoints."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Per epoch: training loss, validation metrics, seconds."""
    validation: dict[str, float] = field(default_factory=dict)
    """All validation scores of these weights."""
    test: dict[str, float] = field(default_factory=dict)
    """Scores of these weights on the test samples; empty without any."""


class Batches(Iterable[Batch], Sized, Protocol):
    """Batches of one epoch, the same number every epoch; `set_epoch` chooses the order."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator for device, precision and processes, and seed the random numbers of this process.

    A batch is divided among processes (`split_batches`), so that a schedule has as many steps as with one process.

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
    test: Callable[[Path], dict[str, float]] = lambda _: {},
) -> TrainResult:
    """Train `suffix`; write its weights to `out/model.safetensors` and its curves beside them.

    A killed run resumes from `checkpoint`, a folder of this run only, which is removed at the end. `fresh` names the
    parameters of the suffix that were not pretrained; `weights` returns the tensors of a suffix to keep. `test` returns
    the test scores of a file of weights: it is called once, with those that the run keeps, and decides nothing.
    """
    writes = accelerator.is_main_process
    objective = Objective(suffix, task)
    model = prepare(objective, training, accelerator)
    # After the move to the device, which may replace parameters.
    optimizer = torch.optim.AdamW(parameter_groups(objective, config, fresh))
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
        result = _result(progress, progress.initial, task, config)
        if writes:
            shutil.copyfile(checkpoint / f"{config.keep}.safetensors", out / "model.safetensors")
        accelerator.wait_for_everyone()
        result.test = test(out / "model.safetensors")
        if live:
            live.log_result({"validation": result.validation, "test": result.test})
    if writes:
        shutil.rmtree(checkpoint)
    return result


def _result(progress: Progress, initial: float, task: Task, config: TrainConfig) -> TrainResult:
    epoch = progress.best_epoch if config.keep == "best" else progress.epoch
    row = progress.history[epoch - 1]
    scores = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("validation/")}
    return TrainResult(
        metric=task.monitor,
        value=scores[task.monitor],
        initial=initial,
        best_epoch=epoch,
        train_seconds_per_epoch=statistics.median(row["train/seconds"] for row in progress.history),
        history=progress.history,
        validation=scores,
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
    hidden = None if accelerator.is_main_process else True
    for batch in tqdm(batches, desc=f"epoch {epoch + 1}/{config.epochs}", unit="batch", disable=hidden, leave=False):
        count += 1
        # An epoch ends with a step: a killed run resumes without accumulated gradients.
        steps = count % config.gradient_accumulation == 0 or count == len(batches)
        with nullcontext() if steps else accelerator.no_sync(objective):
            with accelerator.autocast():
                loss = objective(batch)
            accelerator.backward(loss)
        if steps:
            if config.max_grad_norm is not None:
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


def parameter_groups(model: nn.Module, config: TrainConfig, fresh: frozenset[str]) -> list[dict[str, Any]]:
    """Return AdamW's groups: pretrained and fresh parameters, each with and without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fresh = name.removeprefix("suffix.") in fresh or name.startswith("loss.")
            groups.setdefault((is_fresh, parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise TrainError(
            "nothing trains after this cut: no parameter is left; choose a cut below 1.0 or a head with parameters"
        )
    return [
        {
            "params": parameters,
            "lr": (config.head_lr or config.lr) if is_fresh else config.lr,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_fresh, decays), parameters in groups.items()
    ]


def schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """Return the learning-rate schedule over `steps` steps."""
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after: LRScheduler
    if config.schedule == "cosine":
        after = CosineAnnealingLR(optimizer, rest)
    elif config.schedule == "linear":
        after = LinearLR(optimizer, 1.0, 0.0, rest)
    else:
        after = ConstantLR(optimizer, 1.0)
    if not warmup:
        return after
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup), after], milestones=[warmup])
