"""How fast each worker is, as the terminal tells it at the end."""

from __future__ import annotations

import logging
from collections import defaultdict

from pipeline.cluster.worker import WorkerReport

log = logging.getLogger("recycle")

TOLD = 16
"""Workers that are told one by one; of more the slowest and the fastest are."""


class Rates:
    """Samples and seconds by worker."""

    def __init__(self) -> None:
        self.samples: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, report: WorkerReport, samples: int) -> None:
        """Count a report on so many samples; what was there already took no time."""
        if report.seconds:
            self.samples[report.worker] += samples
            self.seconds[report.worker] += report.seconds

    def tell(self) -> None:
        """Log each worker's samples per second while it ran units."""
        rates = sorted((self.samples[name] / self.seconds[name], name) for name in self.samples)
        shown = rates if len(rates) <= TOLD else [*rates[: TOLD // 2], *rates[-TOLD // 2 :]]
        for rate, name in shown:
            log.info("worker %s: %d samples, %.1f samples/s", name, self.samples[name], rate)
        if len(shown) < len(rates):
            log.info("%d workers in all, %.1f samples/s together", len(rates), sum(rate for rate, _ in rates))
