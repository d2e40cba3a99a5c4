"""Sweep: a list of runs -> finished runs, trained in one process or shared among several.

What runs of a cut share (samples, stores, the split model, states in the memory of a device) is opened once, and every
run starts from the same tensors and random numbers as `recycle train`. A run is claimed by the lock on its checkpoint
folder, so that any number of processes may have the same list.
"""

import gc
import logging
import multiprocessing
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, RecyclingError
from pipeline.keys import digest
from pipeline.memory import keep_freed_memory
from pipeline.runs.planned import PlannedRun, Settings, plan_runs
from pipeline.runs.record import Run
from pipeline.tasks.config import LOWER_IS_BETTER
from pipeline.train import processes
from pipeline.train.checkpoint import claimed_checkpoint
from pipeline.train.objective import to_device
from pipeline.train.stacked_steps import FREE
from pipeline.workflows.train import OpenCut, open_run_accelerator, train_opened, train_stack

log = logging.getLogger("recycle")

OPENED = ("channels_last", "check", "compile", "dtype", "gradient_checkpointing", "residency", "scratch_gb")
"""Settings of `train` that what is opened depends on, as it does on all other sections."""
LARGEST_STACK = 32
"""Runs that are trained at once at most; it bounds the memory for their outputs."""
Failures = MutableMapping[str, str]
"""Name of a run that failed -> the message."""


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep."""

    finished: Sequence[Run]
    failed: Failures
    elsewhere: Sequence[str]
    """Names of runs that other processes are training."""

    @property
    def best_first(self) -> list[Run]:
        """The finished runs, by the score that decides about each."""
        signs = {run.metric: 1 if run.metric in LOWER_IS_BETTER else -1 for run in self.finished}
        return sorted(self.finished, key=lambda run: (run.metric, signs[run.metric] * run.value))


def sweep_project(
    params: Path, fixed: Settings, settings: Sequence[Settings], *, jobs: int = 1, stacked: bool = False
) -> SweepResult:
    """Train the runs of `settings` that are not finished, with `jobs` processes; see `plan_runs`.

    Those that can be trained at once are, if `stacked`. A run that fails does not end the sweep.

    Raises:
        ConfigError: a run has a wrong setting; no run is started then.
    """
    if processes.world() > 1:
        raise ConfigError(
            "recycle sweep runs under torchrun; start it alone, with --jobs, or start recycle train there"
        )
    runs = plan_runs(params, fixed, settings)
    _check_accelerators(runs)
    waiting = [run for run in runs if run.finished() is None]
    log.info("%d runs, %d of them finished already", len(runs), len(runs) - len(waiting))
    failed: Failures = {}
    at_once = min(LARGEST_STACK, -(-len(waiting) // jobs)) if stacked else 1
    with _helpers(min(jobs, len(waiting)) - 1, params, fixed, settings, at_once) as shared:
        train_runs(waiting, shared, at_once)
        failed = dict(shared)
    train_runs([run for run in waiting if run.finished() is None], failed, at_once)  # those of processes that died
    done = {run.name: run.finished() for run in runs}
    finished = [run for run in done.values() if run is not None]
    return SweepResult(finished, failed, [name for name, run in done.items() if run is None and name not in failed])


def _check_accelerators(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError, with all messages, where a run cannot be trained on this machine."""
    faults = dict[str, None]()
    for run in runs:
        try:
            open_run_accelerator(run.project, run.name)
        except ConfigError as error:
            faults[str(error)] = None
    if faults:
        raise ConfigError("\n".join(faults))


def train_runs(runs: Sequence[PlannedRun], failed: Failures, at_once: int = 1) -> None:
    """Train those of `runs` that are neither finished, nor trained by another process, nor among `failed`.

    Up to `at_once` runs are trained at once where they differ in `stacked.FREE` only.
    """
    for number, group in enumerate(_grouped(runs, _key)):
        if number:
            gc.collect()  # what belongs to the cut before this one
        shared = _SharedCut()
        for alike in _grouped(group, _stack_key):
            for begin in range(0, len(alike), at_once):
                _train_at_once(alike[begin : begin + at_once], shared, failed)
        for run in group:
            if run.name not in failed:
                _train_unless_taken(run, shared, failed)
        del shared


def _grouped(runs: Sequence[PlannedRun], key: Callable[[PlannedRun], str]) -> list[list[PlannedRun]]:
    by_key: dict[str, list[PlannedRun]] = {}
    for run in runs:
        by_key.setdefault(key(run), []).append(run)
    return list(by_key.values())


def _train_at_once(runs: Sequence[PlannedRun], shared: "_SharedCut", failed: Failures) -> None:
    """Train those of `runs` that no process has started, at once, up to their record; leave all where it cannot be."""
    if len(runs) < 2:
        return
    with ExitStack() as claims:
        ours = [run for run in runs if claims.enter_context(claimed_checkpoint(run.checkpoint))]
        new = [run for run in ours if run.finished() is None and not any(run.checkpoint.iterdir())]
        if len(new) < 2:
            return
        try:
            failed.update(train_stack(new, shared.open(new[0])))
        except RecyclingError as error:
            log.info("%d runs are trained one after the other: %s", len(new), error)


def _train_unless_taken(run: PlannedRun, shared: "_SharedCut", failed: Failures) -> None:
    with claimed_checkpoint(run.checkpoint) as is_ours:
        if not is_ours:
            return
        if run.finished() is not None:
            with suppress(OSError):  # another process may be just about to lock it
                run.checkpoint.rmdir()
            return
        opened = shared.open(run)
        log.info("run %s", run.name)
        try:
            train_opened(run, opened, open_run_accelerator(run.project, run.name))
        except RecyclingError as error:
            failed[run.name] = str(error)
            log.error("run %s failed: %s", run.name, error)


def _key(run: PlannedRun) -> str:
    """Return a digest that runs share if they may be trained on one opened cut."""
    project = run.project
    names = ("data", "model", "preprocess", "task", "encode", "towers")
    sections = [getattr(project, name).model_dump(mode="json") for name in names]
    opened = project.train.model_dump(mode="json", include=set(OPENED))
    return digest([str(run.cut), *sections, opened, project.train.adapter is None])


def _stack_key(run: PlannedRun) -> str:
    """Return a digest that runs of one opened cut share if they may be trained at once."""
    return digest([run.project.train.model_dump(mode="json", exclude=set(FREE))])


class _SharedCut:
    """A cut that is opened for the first run; each further run finds the suffixes as the first one did."""

    def __init__(self) -> None:
        self._opened: OpenCut | None = None
        self._initial: list[dict[str, Tensor]] = []

    def open(self, run: PlannedRun) -> OpenCut:
        """Return the opened cut, with the suffixes' initial tensors."""
        if self._opened is None:
            self._opened = OpenCut.of(run.project, run.cut)
            self._initial = [_copies(tower.suffix) for tower in self._opened.towers]
        else:
            for tower, initial in zip(self._opened.towers, self._initial, strict=True):
                _restore(tower.suffix, initial)
        return self._opened


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


@torch.no_grad()
def _restore(module: nn.Module, initial: dict[str, Tensor]) -> None:
    """Move `module` back to the CPU, and give its parameters and buffers the values `initial`."""
    to_device(module, torch.device("cpu"))
    for name, tensor in _tensors(module).items():
        tensor.copy_(initial[name])
        tensor.grad = None


@contextmanager
def _helpers(
    count: int, params: Path, fixed: Settings, settings: Sequence[Settings], at_once: int
) -> Iterator[Failures]:
    """Start `count` processes that train runs of the same list, and wait for them at the end; give the shared failures.

    Torch's threads are divided among all processes.
    """
    if count < 1:
        yield {}
        return
    threads = max(1, torch.get_num_threads() // (count + 1))
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        failed = manager.dict()
        given: tuple[Any, ...] = (params, fixed, settings, failed, threads, at_once)
        helpers = [context.Process(target=_help, args=given, daemon=True) for _ in range(count)]
        for helper in helpers:
            helper.start()
        try:
            yield failed
            for helper in helpers:
                helper.join()
        finally:
            for helper in helpers:
                helper.kill()
        if died := [helper.exitcode for helper in helpers if helper.exitcode]:
            log.warning("%d of %d processes ended early, with %s", len(died), count, ", ".join(map(str, died)))


def _help(
    params: Path, fixed: Settings, settings: Sequence[Settings], failed: Failures, threads: int, at_once: int
) -> None:
    """Train runs in a process that has been started for it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    keep_freed_memory()
    torch.set_num_threads(threads)
    train_runs(plan_runs(params, fixed, settings), failed, at_once)
