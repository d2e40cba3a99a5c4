"""Reports of workers -> outcomes, and the samples per second of each worker, logged at the end."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from pipeline.cluster.worker import WorkerReport
from pipeline.encode.unit import Outcome, Unit

log = logging.getLogger("recycle")

REPORTS = 16
"""Number of workers logged one by one; of more, only the slowest and the fastest."""


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
        shown = rates if len(rates) <= REPORTS else [*rates[: REPORTS // 2], *rates[-REPORTS // 2 :]]
        for rate, name in shown:
            log.info("worker %s: %d samples, %.1f samples/s", name, self.samples[name], rate)
        if len(shown) < len(rates):
            log.info("%d workers in all, %.1f samples/s together", len(rates), sum(rate for rate, _ in rates))
