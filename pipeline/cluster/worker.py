"""The worker's side of every executor: run units, and report the outcome of each part; and what reports add up to.

A unit is requested again if its worker is lost. Committed units are skipped, and a unit that keeps killing its process
is set aside: a worker marks its current unit by a file in the job's folder, and the marks of dead workers stay.
"""

import logging
import os
import platform
import secrets
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter

from pipeline.cluster.job import Job
from pipeline.encode.decoding import explain_dead_workers
from pipeline.encode.encoder import Encoder
from pipeline.encode.quarantine import ENDS_THE_RUN, BadSample, name_of
from pipeline.encode.unit import EncodeCosts, Outcome, Unit
from pipeline.errors import ClusterError, RecyclingError
from pipeline.keys import JSON
from pipeline.memory import keep_freed_memory

log = logging.getLogger("recycle")

MARKS = "marks"
POISON = "its unit killed the process that ran it"
SHOWN_WORKERS = 16
"""Number of workers logged one by one; of more, only the slowest and the fastest."""


@dataclass(frozen=True)
class WorkerReport:
    """A worker's report on one part of a unit."""

    worker: str
    unit: int
    """Number of the unit in the run."""
    part: int
    """Number of the part in the unit."""
    seconds: float
    """Since the worker's last report."""
    bad: list[BadSample] = field(default_factory=list)
    cut_off: list[int] = field(default_factory=list)
    promoted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    costs: EncodeCosts = field(default_factory=EncodeCosts)


REPORT = TypeAdapter(WorkerReport)
"""Reports as JSON: no pickle is read, and a worker of another version is refused."""


class Worker:
    """An encoder built on this machine, which runs units until the process ends."""

    def __init__(self, job: Job, name: str, own: Mapping[str, JSON] | None = None) -> None:
        """Prepare for units of `job`; the encoder is built with the first.

        `name` is the coordinator's name of this worker; `own` are settings of `encode` of this worker only.
        """
        self.job, self.own = job, own or {}
        self.name = f"{platform.node()}:{name}".replace("/", "_")
        self._encoder: Encoder | None = None
        self._mark: Path | None = None

    def run(self, units: Mapping[int, Unit]) -> Generator[WorkerReport, None, None]:
        """Run `units`, by their numbers in the run; yield a report on each part.

        Raises:
            RecyclingError: the run cannot go on; the message names this worker.
        """
        try:
            yield from self._run(units)
        except ENDS_THE_RUN:
            raise
        except RecyclingError as error:
            raise type(error)(f"worker {self.name}: {error}") from error
        except BaseException as error:
            log.exception("worker %s failed", self.name)
            message = " ".join(str(error).split())
            raise ClusterError(f"worker {self.name}: {type(error).__name__}: {message}; its log has more") from error
        finally:
            self.leave()

    def leave(self) -> None:
        """Remove the mark: the current unit did not kill this worker."""
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)
            self._mark = None

    def _run(self, units: Mapping[int, Unit]) -> Iterator[WorkerReport]:
        self.job.enter()
        encoder = self._build()
        killed, waiting = deaths(self.job.home), dict(units)
        for number, unit in units.items():
            if len(killed[number]) > self.job.retries:
                yield from self._poisonous(encoder, number, unit, killed[number])
            elif encoder.holds(unit):
                yield from (WorkerReport(self.name, number, part, 0.0) for part in range(len(unit.parts)))
            else:
                continue
            del waiting[number]
        numbers, before = list(waiting), time.perf_counter()
        places = [(number, part) for number, unit in waiting.items() for part in range(len(unit.parts))]
        with explain_dead_workers(encoder.workers):
            running = encoder.run(list(waiting.values()), lambda place: self._enter(numbers[place]))
            for (number, part), outcome in zip(places, running, strict=True):
                now = time.perf_counter()
                found = outcome.bad, outcome.cut_off, outcome.promoted, outcome.costs
                yield WorkerReport(self.name, number, part, now - before, *found)
                before = time.perf_counter()

    def _build(self) -> Encoder:
        if self._encoder is None:
            keep_freed_memory()  # as `recycle` does; dask starts its workers without it
            self._encoder = self.job.build(self.own)
        if self.job.threads is not None:
            torch.set_num_threads(self.job.threads)  # for this thread: each has a number of its own
        return self._encoder

    def _enter(self, number: int) -> None:
        """Mark the unit that begins as the current one of this process."""
        marks = self.job.home / MARKS
        mark = marks / f"{number}.{secrets.token_hex(4)}.{self.name}"
        if self._mark is None:
            marks.mkdir(exist_ok=True)
            mark.touch()
        else:
            self._mark.rename(mark)
        self._mark = mark

    def _poisonous(self, encoder: Encoder, number: int, unit: Unit, killed: list[str]) -> Iterator[WorkerReport]:
        workers = ", ".join(sorted(set(killed)))
        reason = f"{POISON}: {len(killed)} times ({workers}); mend the sample, or give more memory"
        for part in range(len(unit.parts)):
            bad = [BadSample(row, name_of(encoder.source, row), reason) for row in unit.rows.tolist()]
            yield WorkerReport(self.name, number, part, 0.0, bad)


def deaths(home: Path) -> defaultdict[int, list[str]]:
    """Return the workers that died at each unit, by its number."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    marks = home / MARKS
    for mark in sorted(os.listdir(marks)) if marks.is_dir() else []:
        number, _, worker = mark.split(".", 2)
        found[int(number)].append(worker)
    return found


class Rates:
    """Samples and seconds by worker, of a run over `units`."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.samples: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def outcome(self, report: WorkerReport) -> Outcome:
        """Add a report, and return the outcome of its part; a part that was stored already took no time."""
        part = self.units[report.unit].parts[report.part]
        if report.seconds:
            self.samples[report.worker] += len(part.rows)
            self.seconds[report.worker] += report.seconds
        return Outcome(part, report.bad, report.cut_off, report.promoted, report.costs)

    def log_rates(self) -> None:
        """Log each worker's samples per second while it ran units."""
        rates = sorted((self.samples[name] / self.seconds[name], name) for name in self.samples)
        shown = rates if len(rates) <= SHOWN_WORKERS else [*rates[: SHOWN_WORKERS // 2], *rates[-SHOWN_WORKERS // 2 :]]
        for rate, name in shown:
            log.info("worker %s: %d samples, %.1f samples/s", name, self.samples[name], rate)
        if len(shown) < len(rates):
            log.info("%d workers in all, %.1f samples/s together", len(rates), sum(rate for rate, _ in rates))
