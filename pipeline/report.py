"""Finished runs -> one table, one plot: what recycling costs, saves and keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Run:
    """What `train` measured for one cut; the fields of `run.json`."""

    cut: float | int | str
    recycled: float
    """Share of the blocks before the cut, 0..1."""
    metric: str
    value: float
    initial: float
    """The metric before any training."""
    best_epoch: int
    train_samples: int
    train_seconds_per_epoch: float
    frozen_seconds_per_sample: float
    """Time of the prefix alone on training batches: what frozen layers cost at every epoch where nothing is kept."""
    history: list[dict[str, float]]
    classes: list[Any] = field(default_factory=list)
    """What the outputs are called, in their order; empty where they have no names."""


@dataclass(frozen=True)
class Cost:
    """What `encode` measured for one cut."""

    state_bytes_per_sample: float
    encode_seconds: float | None
    """Read, forward and write time of all samples for this cut alone, without overlap; None where none was timed."""


@dataclass(frozen=True)
class Row:
    """One line of the result table; the fields of `results/summary.json`."""

    cut: float | int | str
    recycled: float
    metric: str
    value: float
    state_bytes_per_sample: int
    encode_seconds: float | None
    train_seconds_per_epoch: float
    epochs: int
    speedup_over_full: float | None
    """Full fine-tuning's seconds per epoch over this run's; None where no run with cut 0 is there to compare."""
    speedup_over_frozen: float
    """Seconds per epoch of the same training with the frozen prefix run each time, over this run's."""
    break_even_epoch: int | None
    """First epoch after which encode + training took less time than training with the frozen prefix run each time."""


def summarise(runs: Sequence[Run], costs: Mapping[str, Cost]) -> list[Row]:
    """Return a row per run, in the order of the recycled share; `costs` by the text of the cut."""
    full = next((run.train_seconds_per_epoch for run in runs if run.recycled == 0), None)
    return [_row(run, costs[str(run.cut)], full) for run in sorted(runs, key=lambda run: run.recycled)]


def _row(run: Run, cost: Cost, full: float | None) -> Row:
    saved = run.frozen_seconds_per_sample * run.train_samples
    return Row(
        cut=run.cut,
        recycled=run.recycled,
        metric=run.metric,
        value=run.value,
        state_bytes_per_sample=round(cost.state_bytes_per_sample),
        encode_seconds=cost.encode_seconds,
        train_seconds_per_epoch=run.train_seconds_per_epoch,
        epochs=len(run.history),
        speedup_over_full=full / run.train_seconds_per_epoch if full else None,
        speedup_over_frozen=(run.train_seconds_per_epoch + saved) / run.train_seconds_per_epoch,
        break_even_epoch=None
        if not saved or cost.encode_seconds is None
        else math.floor(cost.encode_seconds / saved) + 1,
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, aligned for a terminal."""
    frame = pd.DataFrame([asdict(row) for row in rows])
    shown = pd.DataFrame(
        {
            "cut": [str(row.cut) for row in rows],
            "recycled": frame["recycled"].map("{:.0%}".format),
            rows[0].metric: frame["value"].map("{:.3f}".format),
            "bytes/sample": frame["state_bytes_per_sample"].map("{:,}".format),
            "encode s": frame["encode_seconds"].map(_rounded),
            "train s/epoch": frame["train_seconds_per_epoch"].map("{:.2f}".format),
            "epochs": frame["epochs"].astype(str),
            "x full": frame["speedup_over_full"].map(_rounded),
            "x frozen": frame["speedup_over_frozen"].map(_rounded),
            "break-even epoch": frame["break_even_epoch"].map(lambda epoch: "-" if pd.isna(epoch) else f"{epoch:.0f}"),
        }
    )
    return shown.to_string(index=False)


def _rounded(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.1f}"


def curves(runs: Sequence[Run], costs: Mapping[str, Cost]) -> pd.DataFrame:
    """Return the metric of every epoch of every run against the seconds spent until then, encode included."""
    lines = []
    for run in runs:
        seconds = costs[str(run.cut)].encode_seconds or 0.0
        for epoch, row in enumerate(run.history, start=1):
            seconds += row["train/seconds"]
            lines.append(
                {
                    "cut": str(run.cut),
                    "epoch": epoch,
                    "seconds": seconds,
                    "metric": run.metric,
                    "value": row[f"validation/{run.metric}"],
                    "loss": row["train/loss"],
                }
            )
    return pd.DataFrame(lines)


def plot(runs: Sequence[Run], costs: Mapping[str, Cost], path: Path) -> None:
    """Draw the metric against the seconds spent, encode included, one line per cut, as a PNG."""
    import matplotlib  # noqa: PLC0415  (slow to import, and no other stage draws)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    for run in sorted(runs, key=lambda run: run.recycled):
        line = curves([run], costs)
        label = f"cut {run.cut} ({run.recycled:.0%} recycled)"
        axes.plot(line["seconds"], line["value"], marker="o", label=label)
    axes.set_xlabel("seconds: encode, then training")
    axes.set_ylabel(f"validation {runs[0].metric.replace('_', ' ')}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
