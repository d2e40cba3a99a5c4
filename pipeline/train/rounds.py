"""The optimizer steps of a run and its rounds, the spans of steps between two validations: by default its epochs.

After every round the run is validated, logged and saved; a killed run resumes after its last complete round.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from pipeline.train.config import TrainConfig
from pipeline.train.loader import Batch


class Batches(Iterable[Batch], Sized, Protocol):
    """Batches of one epoch, the same number every epoch; `set_epoch` chooses the order."""

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        """Choose the epoch of the next iteration, and its batches from `start` to before `end`."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run, counted from 0, as are its steps over all epochs.

    Attributes:
        batches: batches of an epoch.
        accumulation: batches of a step; the last step of an epoch takes the remaining ones.
        steps: optimizer steps of the run.
        steps_per_round: those between two validations.
    """

    batches: int
    accumulation: int
    steps: int
    steps_per_round: int

    @classmethod
    def of(cls, config: TrainConfig, batches: int) -> "Rounds":
        """Return the rounds of a run with so many batches per epoch."""
        per_epoch = -(-batches // config.gradient_accumulation)
        steps = config.max_steps or config.epochs * per_epoch
        return cls(batches, config.gradient_accumulation, steps, config.eval_every or per_epoch)

    def __len__(self) -> int:
        return math.ceil(self.steps / self.steps_per_round)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.batches // self.accumulation)

    @property
    def are_epochs(self) -> bool:
        """Whether every round is a whole epoch."""
        return self.steps_per_round == self.steps_per_epoch and self.steps % self.steps_per_epoch == 0

    def span(self, number: int) -> tuple[int, int]:
        """Return the first step of a round, and the one after its last."""
        return number * self.steps_per_round, min(self.steps, (number + 1) * self.steps_per_round)

    def epochs_after(self, number: int) -> float:
        """Return how many epochs have been trained after a round, the last one perhaps in part."""
        return self.span(number)[1] / self.steps_per_epoch

    def name(self, number: int) -> str:
        """Return the name of a round in messages."""
        if self.steps_per_round == self.steps_per_epoch:
            return f"epoch {number + 1}/{len(self)}"
        start, end = self.span(number)
        return f"steps {start + 1}-{end}/{self.steps}"

    def of_training(self, training: Batches, number: int) -> Iterator[tuple[Batch, bool]]:
        """Yield the batches of a round, and with each whether a step ends after it."""
        step, end = self.span(number)
        while step < end:
            epoch, begin = divmod(step, self.steps_per_epoch)
            stop = min(self.steps_per_epoch, begin + end - step)
            training.set_epoch(epoch, begin * self.accumulation, stop * self.accumulation)
            for count, batch in enumerate(training, start=begin * self.accumulation + 1):
                # An epoch ends with a step: a killed run resumes without accumulated gradients.
                yield batch, count % self.accumulation == 0 or count == self.batches
            step += stop - begin


@dataclass
class Clock:
    """Time that a run will still take, from the rounds trained since `first` in this process."""

    rounds: Rounds
    first: int
    began: float = field(default_factory=time.perf_counter)

    def left(self, done: int) -> timedelta:
        """Return the time of the rounds that follow the first `done`."""
        begin, end = self.rounds.span(self.first)[0], self.rounds.span(done - 1)[1]
        per_step = (time.perf_counter() - self.began) / (end - begin)
        return timedelta(seconds=round(per_step * (self.rounds.steps - end)))
