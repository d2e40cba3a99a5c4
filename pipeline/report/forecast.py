"""results/plan.json: what `recycle plan` predicts for each cut, the verdicts that follow, and what was measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from pipeline.files import write_whole
from pipeline.keys import JSON, digest
from pipeline.project import Project
from pipeline.report.summary import ResultRow

FILE = "plan.json"
MEASURED = {
    "state_bytes_per_sample": ("bytes/sample", ",.0f"),
    "encode_seconds": ("encode s", ".1f"),
    "train_seconds_per_epoch": ("train s/epoch", ".2f"),
    "break_even_epoch": ("break-even epoch", "d"),
}
"""Title and format of the figures of a `ResultRow` that are predicted too."""


@dataclass(frozen=True)
class CutForecast:
    """Predicted costs of one cut; a figure that could not be measured is None."""

    cut: float | int | str
    recycled: float
    """Share of the blocks before the cut, the smallest of several encoders."""
    samples: int
    state_bytes: int
    """Of all states, all views and encoders."""
    beside_bytes: int
    """Of the pretrained suffix and the probe beside them."""
    encode_seconds: float
    """Read, forward and write time of all samples for this cut alone, as in results/encode.json."""
    frozen_seconds: float
    """Forward time of the layers before the cut over the training samples: their cost per epoch without recycling."""
    epoch_seconds: float | None = None
    reason: str | None = None
    """Why a figure is None."""

    def predicted(self) -> dict[str, float | None]:
        """Return the figures of `MEASURED`."""
        return {
            "state_bytes_per_sample": self.state_bytes / max(1, self.samples),
            "encode_seconds": self.encode_seconds,
            "train_seconds_per_epoch": self.epoch_seconds,
            "break_even_epoch": break_even(self.encode_seconds, self.frozen_seconds),
        }


@dataclass(frozen=True)
class Forecast:
    """Predictions for one state of the settings."""

    settings: str
    """Digest of the settings that they are for."""
    samples_tried: int
    encode_seconds: float
    """Of one encode of all cuts, in which reading, computing and writing overlap."""
    total_bytes: int
    """Of the stores of all cuts, with what lies beside the states."""
    full_epoch_seconds: float | None
    """Seconds per epoch of full fine-tuning, from stored inputs."""
    epochs: float
    cuts: list[CutForecast]
    notes: list[str] = field(default_factory=list)


def settings_digest(project: Project) -> str:
    """Return the digest of the settings that a forecast depends on."""
    names = ("data", "model", "preprocess", "task", "encode", "train", "towers")
    settings: dict[str, JSON] = {name: getattr(project, name).model_dump(mode="json") for name in names}
    return digest(settings)


def break_even(encode: float, saved: float | None) -> int | None:
    """Return the first epoch after which an encode that saves so many seconds an epoch has paid off, or None."""
    return math.floor(encode / saved) + 1 if saved is not None and saved > 0 else None


def over_full(forecast: Forecast, cut: CutForecast) -> float | None:
    """Return the seconds an epoch that `cut` saves over full fine-tuning; None where they are unknown."""
    known = forecast.full_epoch_seconds is not None and cut.epoch_seconds is not None
    return forecast.full_epoch_seconds - cut.epoch_seconds if known else None  # type: ignore[operator]


def verdict(forecast: Forecast, cut: CutForecast, *, runs: int, free: int | None) -> str:
    """Return whether to store the states of a cut for so many runs, with the reason; `free` bytes of disk if known."""
    needed, epochs = cut.state_bytes + cut.beside_bytes, forecast.epochs * runs
    if free is not None and needed > free:
        return f"do not cache: it takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB of disk are free"
    if not cut.recycled:
        return "full fine-tuning: no layer is recycled, reading and preprocessing are"
    if cut.epoch_seconds is None:
        return f"unknown: {cut.reason}"
    recycled = cut.encode_seconds + epochs * cut.epoch_seconds
    others = {"running the frozen layers in every step": epochs * (cut.epoch_seconds + cut.frozen_seconds)}
    if forecast.full_epoch_seconds is not None:
        others["full fine-tuning"] = epochs * forecast.full_epoch_seconds
    name, least = min(others.items(), key=lambda other: other[1])
    if recycled >= least:
        return f"do not cache: {name} takes {least:,.1f} s for {epochs:g} epochs, encode and train {recycled:,.1f} s"
    return f"cache: {recycled:,.1f} s for {epochs:g} epochs, against {least:,.1f} s of {name}"


def read_forecast(project: Project) -> Forecast | None:
    """Return the forecast for today's settings; None if there is none, or one of other settings or versions."""
    try:
        content = json.loads((project.results / FILE).read_text(encoding="utf-8"))
        forecast = TypeAdapter(Forecast).validate_python(content["forecast"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return forecast if forecast.settings == settings_digest(project) else None


def write_plan(project: Project, plan: Mapping[str, Any]) -> None:
    """Write results/plan.json."""
    write_whole(project.results / FILE, json.dumps(plan, indent=2) + "\n")


def comparison(project: Project, rows: Sequence[ResultRow], *, markdown: bool = False) -> str | None:
    """Return the table of predicted / measured figures of the `rows` with the settings of params.yaml alone.

    None where there is no forecast for today's settings, or no such row.
    """
    import pandas as pd  # noqa: PLC0415  (slow to import)

    forecast = read_forecast(project)
    cuts = {} if forecast is None else {str(cut.cut): cut for cut in forecast.cuts}
    lines = [_compared(cuts[str(row.cut)], row) for row in rows if str(row.cut) in cuts and not row.settings]
    if not lines:
        return None
    shown = pd.DataFrame(lines)
    table = shown.to_markdown(index=False, disable_numparse=True) if markdown else shown.to_string(index=False)
    return f"predicted by recycle plan / measured:\n\n{table}"


def _compared(cut: CutForecast, row: ResultRow) -> dict[str, str]:
    predicted = cut.predicted()
    figures = {title: _both(predicted[name], getattr(row, name), form) for name, (title, form) in MEASURED.items()}
    return {"cut": str(row.cut), **figures}


def _both(predicted: float | None, measured: float | None, form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in (predicted, measured))
