"""The inner flow of train: batches -> suffix -> loss -> optimizer -> metrics, round by round.

`fit` takes iterables of batches, not a store. `accelerate` drives device, precision and checkpoints; a killed run
resumes after its last complete round (by default an epoch) and ends with the weights of an uninterrupted run. Every
process of a run calls `fit`; the main one writes.
"""

import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from pipeline.device import check_compiler, warn_of_emulation
from pipeline.errors import ConfigError, TrainError
from pipeline.tasks import Task
from pipeline.train import processes
from pipeline.train.checkpoint import Progress, resume, save
from pipeline.train.config import TrainConfig
from pipeline.train.objective import Objective, evaluate, prepare
from pipeline.train.optimizer import open_optimizer, schedule
from pipeline.train.rounds import Batches, Clock, Rounds
from pipeline.train.trackers import check_loggers

if TYPE_CHECKING:
    from pipeline.train.run_log import RunLog

log = logging.getLogger("recycle")


@dataclass
class TrainResult:
    """The result of a training run."""

    metric: str
    """Name of the validation metric that selects the best round."""
    value: float
    """Its value for the weights that the run keeps."""
    initial: float
    """Its value before training."""
    best_epoch: int
    """Epoch these weights come from, counted from 1."""
    train_seconds_per_epoch: float
    """Median over the rounds, without validation and checkpoints."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Per round: training loss, validation metrics, seconds; the epochs until then where rounds are no epochs."""
    validation: dict[str, float] = field(default_factory=dict)
    """All validation scores of these weights."""
    test: dict[str, float] = field(default_factory=dict)
    """Scores of these weights on the test samples; empty without any."""


def open_accelerator(config: TrainConfig, logs: Path) -> Accelerator:
    """Return the accelerator for device, precision, processes and trackers, which have their files in `logs`.

    A batch is divided among processes (`split_batches`), so that a schedule has as many steps as with one process.

    Raises:
        ConfigError: a tracker is not installed, there are more processes than units in a step, or the CPU cannot
            compute in `config.precision`.
    """
    if config.precision == "fp16" and processes.state().device.type == "cpu":
        raise ConfigError("train.precision is fp16, which the CPU does not train in; set bf16 or no")
    warn_of_emulation("train.precision", config.precision, processes.state().device)
    if config.compile:
        check_compiler("train.compile", processes.state().device)
    check_loggers(config)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        log_with=list(config.loggers) or None,
        project_dir=logs,
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

    A killed run resumes from `checkpoint`, a folder of this run only. `fresh` names the parameters of the suffix that
    were not pretrained; `weights` returns the tensors of a suffix to keep. `test` returns
    the test scores of a file of weights: it is called once, with those that the run keeps, and decides nothing.
    """
    from pipeline.train.run_log import RunLog  # noqa: PLC0415  (by DVCLive, which the loop itself does not need)

    writes = accelerator.is_main_process
    objective = Objective(suffix, task)
    model = prepare(objective, training, accelerator)
    rounds = Rounds.of(config, len(training))
    # After the move to the device, which may replace parameters.
    optimizer = open_optimizer(objective, config, fresh)
    optimizer, scheduler = accelerator.prepare(optimizer, schedule(optimizer, config, rounds.steps))
    progress = resume(accelerator, checkpoint)
    if 0 < progress.rounds < len(rounds):
        log.info("goes on from %s, checkpoint %s", rounds.name(progress.rounds), checkpoint)
    if progress.initial is None:
        progress.initial = evaluate(suffix, task, validation, accelerator)[task.monitor]
    with RunLog(out) if writes else nullcontext() as live:
        record = _Recorder(live, accelerator, rounds, progress.history)
        clock = Clock(rounds, progress.rounds)
        while not progress.exhausted(len(rounds), config.patience):
            number = progress.rounds
            row = train_round(model, training, optimizer, scheduler, accelerator, config, rounds, number)
            metrics = evaluate(suffix, task, validation, accelerator)
            row |= {f"validation/{name}": value for name, value in metrics.items()}
            better = progress.take(row, metrics[task.monitor], higher=task.higher_is_better)
            record.round(number, row)
            save(accelerator, weights(suffix) if writes else {}, checkpoint, progress, better=better)
            log.info("%s", _line(progress, rounds, task.monitor, clock))
        result = _result(progress, progress.initial, task, config, rounds)
        if writes:
            shutil.copyfile(checkpoint / f"{config.keep}.safetensors", out / "model.safetensors")
        accelerator.wait_for_everyone()
        result.test = test(out / "model.safetensors")
        record.result(result)
    return result


class _Recorder:
    """Logs the figures of a run, for DVC and for the trackers; only the main process writes."""

    def __init__(
        self, live: "RunLog | None", accelerator: Accelerator, rounds: Rounds, history: Sequence[dict[str, float]]
    ) -> None:
        """Log the rounds before a run was resumed."""
        self._live, self._accelerator, self._rounds = live, accelerator, rounds
        for number, row in enumerate(history):
            self.round(number, row)

    def round(self, number: int, row: dict[str, float]) -> None:
        """Log the figures of a round."""
        if self._live:
            self._live.log_epoch(row)
        self._accelerator.log(row, step=self._rounds.span(number)[1])

    def result(self, result: TrainResult) -> None:
        """Log the scores of the weights that the run keeps."""
        if self._live:
            self._live.log_result({"validation": result.validation, "test": result.test})


def _line(progress: Progress, rounds: Rounds, monitor: str, clock: Clock) -> str:
    """Return the line of the last round for the log."""
    row, left = progress.history[-1], clock.left(progress.rounds)
    parts = [f"loss {row['train/loss']:.4g}", f"{monitor} {row[f'validation/{monitor}']:.4g}"]
    if not math.isnan(progress.best):
        parts[-1] += " (best)" if progress.best_round == progress.rounds else f" (best {progress.best:.4g})"
    parts += [f"{row['train/seconds']:.1f} s", *([f"{left} left"] if left else [])]
    return f"{rounds.name(progress.rounds - 1)}: {', '.join(parts)}"


def _result(progress: Progress, initial: float, task: Task, config: TrainConfig, rounds: Rounds) -> TrainResult:
    kept = progress.best_round if config.keep == "best" else progress.rounds
    row = progress.history[kept - 1]
    scores = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("validation/")}
    return TrainResult(
        metric=task.monitor,
        value=scores[task.monitor],
        initial=initial,
        best_epoch=math.ceil(rounds.epochs_after(kept - 1)),
        train_seconds_per_epoch=statistics.median(
            row["train/seconds"] / (end - start) * rounds.steps_per_epoch
            for number, row in enumerate(progress.history)
            for start, end in [rounds.span(number)]
        ),
        history=progress.history,
        validation=scores,
    )


def train_round(
    objective: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    config: TrainConfig,
    rounds: Rounds,
    number: int,
) -> dict[str, float]:
    """Train on the batches of one round; return its figures, and raise TrainError, as `training_row`."""
    objective.train()
    began = time.perf_counter()
    total, count = torch.zeros((), device=accelerator.device), 0
    start, end = rounds.span(number)
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=end - start, desc=rounds.name(number), unit="step", disable=hidden, leave=False) as bar:
        for batch, steps in rounds.of_training(batches, number):
            count += 1
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
                bar.update()
            total += loss.detach()
    return training_row(float(total) / count, time.perf_counter() - began, config, rounds, number)


def training_row(loss: float, seconds: float, config: TrainConfig, rounds: Rounds, number: int) -> dict[str, float]:
    """Return the figures of a round: its mean loss, its seconds, and the epochs until then if rounds are no epochs.

    Raises:
        TrainError: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainError(
            f"the training loss is {loss} in {rounds.name(number)}; lower train.lr (now {config.lr}) "
            "or set train.max_grad_norm"
        )
    row = {"train/loss": loss, "train/seconds": seconds}
    return row if rounds.are_epochs else row | {"train/epoch": rounds.epochs_after(number)}
