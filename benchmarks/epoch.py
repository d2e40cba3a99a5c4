"""An epoch of a project's training from its stores, against its bounds: python benchmarks/epoch.py examples/scicite

Run after `dvc repro` (or `recycle encode`) in that folder, whose `encode.cuts` have 0. For each cut, over the same
batches in one process:

    measured   what `recycle train` does: batches from the store, loss, backward, optimiser, scheduler
    ideal      the suffix's layers alone: forward, loss, backward and optimiser on the very same batches, held in RAM
    frozen     the ideal step after the frozen prefix: what an epoch takes where nothing is kept
    full       the ideal step of the whole network: full fine-tuning

All take turns, round by round; shown are the medians in seconds per epoch. Inputs of images are drawn: their values do
not change what is measured.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common  # noqa: F401  (memory is kept as `recycle` keeps it)
import torch
from accelerate import Accelerator

from pipeline.data import SampleTable
from pipeline.project import CutName, Project
from pipeline.project.loaders import open_loaders
from pipeline.project.stored_inputs import inputs_of
from pipeline.project.towers import open_tower, trainable_suffix
from pipeline.train.fit import train_round
from pipeline.train.loader import Batch
from pipeline.train.objective import Objective
from pipeline.train.optimizer import open_optimizer, schedule
from pipeline.train.rounds import Batches, Rounds


class FirstBatches:
    """The first batches of a loader's epoch, as often as asked for."""

    def __init__(self, loader: Batches, count: int) -> None:
        self.loader, self.count = loader, min(count, len(loader))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(iter(self.loader), self.count)

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        self.loader.set_epoch(epoch)


def main() -> None:
    """Print a line per cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path, help="folder of a params.yaml whose stores are encoded")
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.chdir(options.project)
    project = Project.load(Path("params.yaml"))
    table = SampleTable.read(project.samples).share(project.data.fraction, project.data.seed)
    print(f"{options.project}, {options.threads} torch threads, {options.rounds} rounds of {options.steps} steps")
    print(f"{'cut':>8} {'measured':>10} {'ideal':>10} {'ratio':>7} {'frozen':>10} {'full':>10}   seconds per epoch")
    whole = Side(project, 0, table, options.steps)
    for cut in project.encode.cuts:
        if cut != 0:
            show(cut, Side(project, cut, table, options.steps), whole, options.rounds)


class Side:
    """The training of one cut, by `recycle` and by hand."""

    def __init__(self, project: Project, cut: CutName, table: SampleTable, steps: int) -> None:
        self.config = project.train
        self.accelerator = Accelerator(
            mixed_precision=self.config.precision, gradient_accumulation_steps=self.config.gradient_accumulation
        )
        tower = open_tower(project, cut, table)
        loaded, views, self.prefix, suffix = tower.loaded, tower.store, tower.prefix, trainable_suffix(tower)
        if self.config.channels_last:
            suffix.to(memory_format=torch.channels_last)
            loaded.backbone.model.to(memory_format=torch.channels_last)
        loader, *_ = open_loaders([tower], table, self.accelerator.device)
        self.steps_per_epoch = len(loader)
        self.batches = FirstBatches(loader, steps)
        self.in_ram = list(self.batches)
        # The loss's own weights are made by `prepare`, which `open_loaders` called.
        self.objective = Objective(suffix, loaded.task).train()
        optimizer = open_optimizer(self.objective, self.config, loaded.backbone.fresh)
        self.scheduler = schedule(optimizer, self.config, steps=10**6)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.inputs = [inputs_of(loaded.stored_batch(views, batch.rows.numpy()), views.path) for batch in self.in_ram]

    def measured(self) -> None:
        """Train as `recycle` does."""
        rounds = Rounds.of(self.config, len(self.batches))
        train_round(
            self.objective, self.batches, self.optimizer, self.scheduler, self.accelerator, self.config, rounds, 0
        )

    def ideal(self) -> None:
        """Train on batches in RAM."""
        for batch in self.in_ram:
            self._step(batch)

    def frozen(self) -> None:
        """Run the prefix before every step."""
        for batch, inputs in zip(self.in_ram, self.inputs, strict=True):
            with torch.no_grad(), self.accelerator.autocast():
                self.prefix(**inputs)
            self._step(batch)

    def _step(self, batch: Batch) -> None:
        with self.accelerator.autocast():
            loss = self.objective(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def show(cut: CutName, side: Side, whole: Side, rounds: int) -> None:
    """Measure one cut and print its line."""
    runs = {"measured": side.measured, "ideal": side.ideal, "frozen": side.frozen, "full": whole.ideal}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            seconds = timed(run)
            if round_:
                times[name].append(seconds * side.steps_per_epoch / len(side.batches))
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = statistics.median(m / i for m, i in zip(times["measured"], times["ideal"], strict=True))
    print(
        f"{cut!s:>8} {found['measured']:10.2f} {found['ideal']:10.2f} {ratio:7.3f} {found['frozen']:10.2f} "
        f"{found['full']:10.2f}",
        flush=True,
    )


def timed(run: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
