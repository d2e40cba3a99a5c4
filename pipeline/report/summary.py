"""Finished runs -> the result table, the curves and the plot for DVC."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.report import charts
from pipeline.report.costs import BACKWARD, CutCost, speed_ups
from pipeline.runs.record import STORE, Run
from pipeline.tasks.config import LOWER_IS_BETTER

SEED = "train.seed"
"""The setting in which runs of one row may differ."""
TOLERANCE = 1.2
"""Factor by which a measured speed-up may exceed the bound from operation counts."""
BOUNDED = (
    "<=: the measured speed-up was above what the numbers of operations allow; this bound is shown instead. It happens "
    "where epochs are short, or the encode ran on another device."
)
TALLEST = 7000
"""Maximum height of a plot in its own pixels."""


@dataclass(frozen=True)
class ResultRow:
    """One line of the result table: runs that differ only in `train.seed`; the fields of `results/summary.json`."""

    cut: float | int | str
    settings: str
    """Settings that differ from params.yaml, without the seed."""
    recycled: float
    metric: str
    runs: int
    value: float
    """The mean over the runs, as all that follows."""
    spread: float | None
    """Standard deviation between runs (n - 1); None for a single run."""
    test: float | None
    """The metric on the test samples; None where not all runs have it."""
    test_spread: float | None
    """Its standard deviation between runs, as `spread`."""
    kept: float | None
    """Value relative to full fine-tuning (inverted for errors); None without a run of cut 0."""
    untrained: float
    """The metric before any training."""
    state_bytes_per_sample: int | None
    encode_seconds: float | None
    train_seconds_per_epoch: float
    epochs: float
    speedup_over_full: float | None
    """Seconds per epoch of full fine-tuning over those of this run; None without a run of cut 0."""
    speedup_over_frozen: float | None
    """Seconds per epoch with the frozen prefix run every time, over those of this run; None if it was not timed."""
    break_even_epoch: int | None
    """First epoch after which encode + training took less time than training with the frozen prefix run every time."""
    bounded: list[str]
    """Speed-ups replaced by the bound from operation counts, because the measured ones exceed it."""


def summarise(runs: Sequence[Run], costs: Mapping[str, CutCost]) -> list[ResultRow]:
    """Return a row per cut and settings, ordered by the recycled share; `costs` are by cut, as text."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.recycled, settings(run))):
        groups.setdefault((settings(run), str(run.cut)), []).append(run)
    full = {of: group for (of, _), group in groups.items() if group[0].recycled == 0}
    return [_row(group, costs.get(cut, CutCost()), full.get(of)) for (of, cut), group in groups.items()]


def settings(run: Run) -> str:
    """Return the settings of a run that differ from params.yaml, but for its seed, in one line."""
    return ", ".join(f"{name}={value}" for name, value in sorted(run.overrides.items()) if name not in (SEED, STORE))


def _row(group: Sequence[Run], cost: CutCost, full: Sequence[Run] | None) -> ResultRow:
    run, values = group[0], [one.value for one in group]
    test = [one.test[run.metric] for one in group if run.metric in one.test]
    seconds, value = _seconds(group), statistics.fmean(values)
    kept = None
    if full is not None:
        of_full = statistics.fmean(one.value for one in full)
        better, worse = (of_full, value) if run.metric in LOWER_IS_BETTER else (value, of_full)
        kept = better / worse if worse else math.nan
    frozen = None if cost.frozen_seconds_per_sample is None else cost.frozen_seconds_per_sample * run.train_samples
    timed = {
        "speedup_over_full": None if full is None else _seconds(full) / seconds,
        "speedup_over_frozen": None if frozen is None else (seconds + frozen) / seconds,
    }
    allowed = dict(zip(timed, _allowed(run, cost), strict=True))
    bounded = [name for name, value in timed.items() if value and value > TOLERANCE * (allowed[name] or math.inf)]
    factors = timed | {name: allowed[name] for name in bounded}
    saved = seconds * ((factors["speedup_over_frozen"] or 1) - 1)
    return ResultRow(
        cut=run.cut,
        settings=settings(run),
        recycled=run.recycled,
        metric=run.metric,
        runs=len(group),
        value=value,
        spread=_spread(values),
        test=statistics.fmean(test) if len(test) == len(group) else None,
        test_spread=_spread(test) if len(test) == len(group) else None,
        kept=kept,
        untrained=statistics.fmean(one.initial for one in group),
        state_bytes_per_sample=None if cost.state_bytes_per_sample is None else round(cost.state_bytes_per_sample),
        encode_seconds=cost.encode_seconds,
        train_seconds_per_epoch=seconds,
        epochs=statistics.fmean(one.history[-1].get("train/epoch", len(one.history)) for one in group),
        **factors,
        break_even_epoch=None
        if not saved or cost.encode_seconds is None
        else math.floor(cost.encode_seconds / saved) + 1,
        bounded=bounded,
    )


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _seconds(group: Sequence[Run]) -> float:
    return statistics.median(run.train_seconds_per_epoch for run in group)


def _allowed(run: Run, cost: CutCost) -> tuple[float | None, float | None]:
    """Return the bounds, from operation counts, of the two speed-ups: over full fine-tuning and over frozen layers."""
    if cost.flops_before is None or cost.flops_after is None:
        return None, None
    adapts = run.made_of.get("train", {}).get("adapter") is not None
    return speed_ups(cost.flops_before, cost.flops_after, backward=1 if adapts else BACKWARD)


def table(rows: Sequence[ResultRow], *, markdown: bool = False) -> str:
    """Return the rows as text, aligned for a terminal, or as a table of Markdown."""
    shown = table_cells(rows)
    text = shown.to_markdown(index=False, disable_numparse=True) if markdown else shown.to_string(index=False)
    return f"{text}\n\n{BOUNDED}" if any(row.bounded for row in rows) else text


def table_cells(rows: Sequence[ResultRow]) -> pd.DataFrame:
    """Return the table as texts, without columns that no row fills."""
    shown = pd.DataFrame(
        [
            {
                "cut": str(row.cut),
                "settings": row.settings,
                "recycled": f"{row.recycled:.0%}",
                rows[0].metric: _with_spread(row.value, row.spread, row.runs),
                f"test {rows[0].metric}": _with_spread(row.test, row.test_spread, row.runs),
                "of full": _known(row.kept, ".2f"),
                "untrained": f"{row.untrained:.3f}",
                "bytes/sample": _known(row.state_bytes_per_sample, ","),
                "encode s": _known(row.encode_seconds, ".1f"),
                "train s/epoch": f"{row.train_seconds_per_epoch:.2f}",
                "epochs": f"{row.epochs:.3g}",
                "x full": _factor(row, "speedup_over_full"),
                "x frozen": _factor(row, "speedup_over_frozen"),
                "break-even epoch": _known(row.break_even_epoch, "d"),
            }
            for row in rows
        ]
    )
    if not any(row.settings for row in rows):
        shown = shown.drop(columns="settings")
    if all(row.test is None for row in rows):
        shown = shown.drop(columns=f"test {rows[0].metric}")
    return shown


def _factor(row: ResultRow, name: str) -> str:
    return ("<= " if name in row.bounded else "") + _known(getattr(row, name), ".1f")


def _with_spread(value: float | None, spread: float | None, runs: int) -> str:
    return _known(value, ".3f") if spread is None else f"{value:.3f} ± {spread:.3f} ({runs})"


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def curves(runs: Sequence[Run], costs: Mapping[str, CutCost]) -> pd.DataFrame:
    """Return metric and loss of every validation of every run against the seconds spent until then, encode included."""
    lines: list[dict[str, Any]] = []
    for run in runs:
        seconds = costs.get(str(run.cut), CutCost()).encode_seconds or 0.0
        fixed = {"run": run.name, "cut": str(run.cut), "metric": run.metric}
        for epoch, row in enumerate(run.history, start=1):
            seconds += row["train/seconds"]
            scores = {"value": row[f"validation/{run.metric}"], "loss": row["train/loss"]}
            lines.append({**fixed, "epoch": row.get("train/epoch", epoch), "seconds": seconds, **scores})
    return pd.DataFrame(lines, columns=["run", "cut", "epoch", "seconds", "metric", "value", "loss"])


def plot(runs: Sequence[Run], costs: Mapping[str, CutCost], path: Path) -> None:
    """Draw the metric against the seconds spent, encode included, and the training loss, a line per run, as a PNG.

    Cuts have colours; runs of other settings have a row of their own.
    """
    ordered = sorted(runs, key=lambda run: run.recycled)
    frame = curves(ordered, costs)
    frame["settings"] = frame["run"].map({run.name: settings(run) for run in runs})
    cuts = list(dict.fromkeys(str(run.cut) for run in ordered))
    score = f"validation {runs[0].metric.replace('_', ' ')}"
    charts.write_png(charts.panels(frame.to_dict("records"), cuts, score, TALLEST), path)
