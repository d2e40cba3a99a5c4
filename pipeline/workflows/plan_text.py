"""The text of `recycle plan`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.report.forecast import CutForecast, Forecast, break_even, over_full, verdict
from pipeline.store import format_bytes
from pipeline.workflows.plan import Plan
from pipeline.workflows.trials.settings import SettingTrial


def text(plan: Plan, *, runs: int, applied: bool) -> str:
    """Return the plan as text; verdicts are for `runs` runs of every cut."""
    forecast, trials = plan.cuts.forecast, plan.settings
    parts = [_data(plan)]
    if trials.trials:
        title = "settings tried: samples/s before the deepest cut; mean deviation from float32, outputs that change"
        parts.append(_section(title, _deviations([_tried(trial) for trial in trials.trials])))
    if trials.batches:
        rows = [{"": one.label, "samples/s": _rate(one), "padding": _share(one.padding)} for one in trials.batches]
        parts.append(_section("batches, in the precision and memory format that are recommended", rows))
    if plan.cuts.codecs:
        rows = [{"": one["storage"], "bytes/sample": format_bytes(one["bytes"]), **one} for one in plan.cuts.codecs]
        title = f"storage of cut {plan.cuts.codecs_of}, deviations from the states as they are stored now"
        parts.append(_section(title, _deviations(rows)))
    title = (
        f"cuts, from {forecast.samples_tried:,} samples; break-even: the epoch after which encode and training took "
        f"less time than full fine-tuning, and than frozen layers that run in every step; below for {runs} x "
        f"{forecast.epochs:g} epochs"
    )
    verdicts = [f"{cut.cut}: {verdict(forecast, cut, runs=runs, free=plan.free_bytes)}" for cut in forecast.cuts]
    parts.append("\n".join([_section(title, [_cut(forecast, cut) for cut in forecast.cuts]), *verdicts]))
    return "\n\n".join([*parts, _totals(plan), _advice(plan, applied=applied)])


def _data(plan: Plan) -> str:
    data = plan.data
    splits = ", ".join(f"{name} {count:,}" for name, count in data.splits.items())
    labels = "".join(f"; {count:,} of {name}" for name, count in data.labels.items())
    lines = [f"data: {data.samples:,} samples: {splits}{labels}", *data.remarks]
    return "\n  ".join([*lines, *([f"cannot be read: {data.unreadable}"] if data.unreadable else [])])


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{title}\n{pd.DataFrame(rows).to_string(index=False)}"


def _tried(trial: SettingTrial) -> dict[str, Any]:
    return {"": trial.label, "samples/s": _rate(trial), **vars(trial)}


def _deviations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the columns that trials of settings and of codecs share, after the two that name them."""
    return [
        {
            **dict(list(row.items())[:2]),
            "states": _share(row["state_mean"]),
            "outputs": _share(row["output_mean"]),
            "changed": _share(row["changed"]),
        }
        for row in rows
    ]


def _cut(forecast: Forecast, cut: CutForecast) -> dict[str, Any]:
    return {
        "cut": str(cut.cut),
        "of blocks": f"{cut.recycled:.0%}",
        "disk": format_bytes(cut.state_bytes + cut.beside_bytes),
        "encode s": f"{cut.encode_seconds:,.1f}",
        "s/epoch": _known(cut.epoch_seconds),
        "with frozen layers": _known(cut.epoch_seconds and cut.epoch_seconds + cut.frozen_seconds),
        "break-even/full": _epoch(cut.encode_seconds, over_full(forecast, cut)),
        "break-even/frozen": _epoch(cut.encode_seconds, cut.epoch_seconds and cut.frozen_seconds),
    }


def _totals(plan: Plan) -> str:
    forecast = plan.cuts.forecast
    free = "" if plan.free_bytes is None else f", {format_bytes(plan.free_bytes)} are free"
    seconds = f"one encode of all: {forecast.encode_seconds:,.1f} s"
    lines = [f"all cuts: {format_bytes(forecast.total_bytes)} of disk{free}; {seconds}"]
    if plan.free_bytes is not None and forecast.total_bytes > plan.free_bytes:
        lines.append("the disk does not suffice for all cuts: encode fewer, or set encode.store or a smaller codec")
    if forecast.full_epoch_seconds is not None:
        lines.append(f"full fine-tuning: {forecast.full_epoch_seconds:,.2f} s/epoch from stored inputs")
    return "\n".join(lines)


def _advice(plan: Plan, *, applied: bool) -> str:
    trials = plan.settings
    notes = [f"note: {note}" for note in [*trials.notes, *plan.cuts.forecast.notes]]
    done = [f"(planned in {plan.seconds:.0f} s; predictions are in results/plan.json)"]
    if not trials.recommended:
        return "\n".join(["recommended: the settings as they are", *notes, *done])
    settings = [
        f"  {name}: {'null' if value is None else str(value).lower()}" for name, value in trials.recommended.items()
    ]
    how = "written to the file of settings; the predictions are for them" if applied else "write them with --apply"
    return "\n".join([f"recommended ({how}):", *settings, *(f"  {reason}" for reason in trials.reasons), *notes, *done])


def _rate(trial: SettingTrial) -> str:
    return f"{trial.samples_per_second:,.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _epoch(encode: float, saved: float | None) -> str:
    """Return the break-even epoch of an encode that saves so many seconds an epoch; None is unknown."""
    epoch = break_even(encode, saved)
    return "not measured" if saved is None else "never" if epoch is None else str(epoch)
