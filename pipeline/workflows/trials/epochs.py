"""Training steps from the stores of a sample, scaled to an epoch of the data set."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline.data import SampleTable
from pipeline.encode.keying import KeyedSamples
from pipeline.errors import RecyclingError
from pipeline.memory import release_freed_memory
from pipeline.project import CutName, Project
from pipeline.project.extrapolation import batch_positions, epoch_positions
from pipeline.project.towers import new_parameters, open_tower
from pipeline.report.forecast import CutForecast
from pipeline.store import KeySet, first_rows
from pipeline.tasks import open_task
from pipeline.train.fit import open_accelerator, train_round
from pipeline.train.loader import Batch
from pipeline.train.objective import Objective, prepare
from pipeline.train.optimizer import open_optimizer, schedule
from pipeline.train.rounds import Batches, Rounds
from pipeline.workflows.codec_error import compare
from pipeline.workflows.train import OpenCut, open_suffix
from pipeline.workflows.trials.encode import EncodeTrial

TRAIN_SECONDS = 2.0
"""Time of the steps that are timed for each cut."""
CODEC_SAMPLES = 64


@dataclass(frozen=True)
class EpochTrials:
    """Training steps from the stores of the sample, scaled to an epoch of the data set."""

    project: Project
    table: SampleTable
    """The samples that a run would have."""
    sample: np.ndarray
    """Those of its rows that are stored, ascending."""
    keyed: KeyedSamples
    tried: Sequence[EncodeTrial]
    planned: Project
    """The project as it is; `project` has its files in another folder, and trains longer than needed."""

    @property
    def per_run(self) -> float:
        """Epochs of a run, as params.yaml has them."""
        return (
            self.planned.train.max_steps / self._real[0] if self.planned.train.max_steps else self.planned.train.epochs
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the stores of all cuts; that of an encoder with a cut of its own counts once."""
        places = {(part, part.number(cut)): cut for part in self.tried for cut in self.planned.encode.cuts}
        suffix = self.planned.encode.suffix
        return sum(
            part.nbytes[number] + part.beside_bytes(cut, suffix=suffix) for (part, number), cut in places.items()
        )

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of each row of the table, and the number of the encoder that has it, (N,) int64 each."""
        rows = KeySet(self.keyed.keys).find(self.table.keys)
        encoders = np.zeros(len(rows), np.int64)
        for number, part in enumerate(self.tried[1:], start=1):
            encoders[self.table.targets["role"] == part.project.tower] = number
        return np.stack([part.lengths[rows] for part in self.tried])[encoders, np.arange(len(rows))], encoders

    @cached_property
    def _real(self) -> tuple[int, int]:
        """Batches and positions of an epoch of the data set."""
        return epoch_positions(open_task(self.project.task), self.table, self.project.train, *self._lengths)

    def forecasts(self, deadline: float) -> list[CutForecast]:
        """Return the predicted costs of all cuts, in their order; the cheapest trainings are tried first."""
        found = [
            self._forecast(cut, deadline) for cut in sorted(self.project.encode.cuts, key=self._share, reverse=True)
        ]
        return sorted(found, key=lambda one: self.project.encode.cuts.index(one.cut))

    def _share(self, cut: CutName) -> float:
        """Return the share of the blocks before a cut, the smallest of all encoders."""
        return min(part.shares[part.number(cut)] for part in self.tried)

    def _forecast(self, cut: CutName, deadline: float) -> CutForecast:
        """Return the predicted costs of one cut."""
        release_freed_memory()
        epoch: float | None = None
        reason: str | None = "the time was up before its training was tried"
        if time.monotonic() < deadline:
            try:
                epoch, reason = self._epoch_seconds(cut), None
            except (RecyclingError, RuntimeError, ValueError) as error:  # of the network's own code, too
                reason = f"training cannot be tried on the sample: {error}"
        encode = frozen = 0.0
        for number, part in enumerate(self.tried):
            seconds, own = part.seconds(cut), self._lengths[1] == number
            encode += sum(seconds.values()) * part.states
            frozen += seconds["forward"] * int((own & (self.table.split == "train")).sum())
        return CutForecast(
            cut=cut,
            recycled=self._share(cut),
            samples=len(first_rows(self.keyed.keys[self.keyed.good])),
            state_bytes=sum(part.nbytes[part.number(cut)] for part in self.tried),
            beside_bytes=sum(part.beside_bytes(cut, suffix=self.planned.encode.suffix) for part in self.tried),
            encode_seconds=encode,
            frozen_seconds=frozen,
            epoch_seconds=epoch,
            reason=reason,
        )

    def _epoch_seconds(self, cut: CutName) -> float:
        """Time steps of training after `cut`, and return the seconds of an epoch of the data set."""
        config = self.project.train
        accelerator = open_accelerator(config, self.project.work_dir / "logs")
        opened = OpenCut.of(self.project, cut, self.sample)
        towers = opened.towers_for(self.project)
        suffix, (training, *_) = open_suffix(opened, towers, config, accelerator.device)
        if config.compile:
            suffix.compile()
        lengths, encoders = (of[self.sample] for of in self._lengths)
        counted, rounds = _Counted(training, lengths, encoders), Rounds.of(config, len(training))
        objective = Objective(suffix, towers[0].loaded.task)
        model = prepare(objective, training, accelerator)
        optimizer = open_optimizer(objective, config, new_parameters(towers))
        optimizer, scheduler = accelerator.prepare(optimizer, schedule(optimizer, config, rounds.steps))
        step = partial(train_round, model, counted, optimizer, scheduler, accelerator, config)
        one = replace(rounds, steps_per_round=1)
        step(one, 0)  # prepares kernels and memory
        end = time.monotonic() + TRAIN_SECONDS
        each = step(one, 1)["train/seconds"] - counted.waits[-1]
        several = replace(rounds, steps_per_round=int(np.clip(TRAIN_SECONDS / 4 / each, 1, rounds.steps_per_epoch)))
        rates = list[float]()
        while not rates or time.monotonic() < end:
            counted.positions, waits = 0, len(counted.waits)
            seconds = step(several, len(rates) + 2)["train/seconds"] - sum(counted.waits[waits:])
            rates.append(seconds / counted.positions)
        return statistics.median(counted.waits[1:]) + statistics.median(rates) * self._real[1]

    def codecs(self, deadline: float) -> tuple[list[dict[str, Any]], str]:
        """Return the errors of each codec in the states of the cut that takes most bytes, and the name of that cut."""
        part = self.tried[0]
        cuts = [cut for cut in self.project.encode.cuts if part.shares[part.number(cut)]]
        if not cuts or time.monotonic() > deadline:
            return [], ""
        cut = max(cuts, key=lambda cut: part.nbytes[part.number(cut)])
        tower = open_tower(part.project, cut, self.table, suffix_only=True, sample=self.sample)
        report = compare(tower, part.project.store_name(cut), CODEC_SAMPLES)
        return [asdict(one) for one in report.deviations], report.cut


class _Counted:
    """The batches of a loader, which adds up their positions, padding included, and times the first of each epoch."""

    def __init__(self, batches: Batches, lengths: np.ndarray, encoders: np.ndarray) -> None:
        self.batches, self.lengths, self.encoders = batches, lengths, encoders
        self.positions = 0
        self.waits = list[float]()
        """Seconds until the first batch of each epoch, or of each part of one."""

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        self.batches.set_epoch(epoch, start, end)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        began = time.perf_counter()
        for number, batch in enumerate(self.batches):
            if number == 0:
                self.waits.append(time.perf_counter() - began)
            self.positions += batch_positions(batch.rows.numpy(), self.lengths, self.encoders)
            yield batch
