"""The charts of the page with their captions, from runs, reviews of runs and the sample table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pipeline.data import SPLITS, SampleTable
from pipeline.report import charts
from pipeline.report.costs import CutCost
from pipeline.report.summary import SEED, ResultRow, curves
from pipeline.runs.record import STORE, Run

MOST_BARS = 30


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    text: str
    svg: str
    """Markup: the template shows it as it is."""


def curve_figures(runs: Sequence[Run], costs: Mapping[str, CutCost]) -> list[Figure]:
    """Return the validation score against the seconds spent, and the training loss, a line for each run."""
    values, cuts = curves(runs, costs).to_dict("records"), _cuts(runs)
    score = charts.lines(values, cuts, "seconds", ("value", runs[0].metric.replace("_", " ")))
    loss = charts.lines(values, cuts, "epoch", ("loss", "training loss"))
    spent = "Validation score against the seconds spent until then, the encode included. A line for each run."
    return [
        _figure("Score and time", spent, score),
        _figure("Training loss", "Mean loss of each epoch. A line for each run.", loss),
    ]


def sweep_figures(runs: Sequence[Run]) -> list[Figure]:
    """Return the score over the recycled share, and over each setting in which the runs differ."""
    cuts, score = _cuts(runs), runs[0].metric.replace("_", " ")
    names = sorted({name for run in runs for name in run.overrides} - {SEED, STORE})
    values = {"recycled share of the blocks": [run.recycled for run in runs]}
    values |= {name: [_value_of(run, name) for run in runs] for name in names}
    return [
        _figure(
            name if name in names else "Score and cut",
            "A point for each run; a line through the means of a cut."
            if name in names
            else "A point for each run; the line joins the means.",
            charts.swept(
                [
                    {"x": x, "y": run.value, "cut": str(run.cut), "run": run.name}
                    for x, run in zip(of_runs, runs, strict=True)
                    if x is not None
                ],
                cuts,
                name,
                score,
                by_cut=name in names,
            ),
        )
        for name, of_runs in values.items()
        if len({json.dumps(value) for value in of_runs}) > 1
    ]


def review_figures(review: Mapping[str, Any]) -> list[Figure]:
    """Return the confusions, the reliability and the points of a review, as far as it has them."""
    figures = []
    if counted := review.get("confusion"):
        spec, shown = charts.confusion([plain(label) for label in counted["labels"]], counted["counts"])
        part = (
            f" {shown} of {len(counted['labels'])} classes, those with most confusions."
            if shown < len(counted["labels"])
            else ""
        )
        figures.append(
            _figure(
                "Confusions", f"What was predicted for each class, in {counted.get('unit', 'samples')}.{part}", spec
            )
        )
    if bins := review.get("reliability"):
        values = [{"x": one["confidence"], "y": one["right"], "size": one["samples"]} for one in bins]
        text = "Share that was right at each confidence; on the line, confidence means what it says. Areas are counts."
        figures.append(
            _figure("Reliability", text, charts.diagonal(values, "confidence", "share right", sized="samples"))
        )
    if points := review.get("points"):
        values = [{"x": x, "y": y} for x, y in points["values"] if np.isfinite([x, y]).all()]
        if values:
            figures.append(
                _figure(
                    f"{points['titles'][1]} and {points['titles'][0]}".capitalize(),
                    "A point for each sample; the line is where both are equal.",
                    charts.diagonal(values, *points["titles"]),
                )
            )
    return figures


def label_figure(table: SampleTable) -> Figure | None:
    """Return the most frequent labels of each split; None where samples have no labels that repeat."""
    name = next((name for name in ("label", "tags") if name in table.targets), None)
    if name is None or table.targets[name].dtype.kind == "f":
        return None
    labels = [one if isinstance(one, list) else [one] for one in table.targets[name].tolist()]
    if any(isinstance(label, float) for label in chain.from_iterable(labels)):
        return None
    kinds = [
        [str(one)[2:] for one in of if str(one).startswith("B-")] if name == "tags" else map(str, of) for of in labels
    ]
    counts = Counter(
        (split, plain(label)) for split, of in zip(table.split.tolist(), kinds, strict=True) for label in of
    )
    total = Counter[str]()
    for (_, label), count in counts.items():
        total[label] += count
    order = [label for label, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MOST_BARS]]
    values = [
        {"x": count, "y": label, "of": split, "number": SPLITS.index(split)}
        for (split, label), count in sorted(counts.items())
        if label in set(order)
    ]
    what = "entities" if name == "tags" else "samples"
    most = f"The {len(order)} most frequent of {len(total)}." if len(order) < len(total) else f"{len(order)} in all."
    splits = [split for split in SPLITS if any(one["of"] == split for one in values)]
    return (
        _figure(
            "Entities by type" if name == "tags" else "Samples by label", most, charts.bars(values, order, what, splits)
        )
        if order
        else None
    )


def break_even_figure(row: ResultRow) -> Figure | None:
    """Return the seconds spent after each epoch, for recycling and for both alternatives; None where none was timed."""
    factors = {
        "full fine-tuning": row.speedup_over_full if row.recycled else None,
        "frozen layers run every time": row.speedup_over_frozen,
    }
    known = {name: factor for name, factor in factors.items() if factor is not None}
    if not known or row.encode_seconds is None:
        return None
    seconds, until = row.train_seconds_per_epoch, max(5, round(row.epochs), min(2 * (row.break_even_epoch or 0), 100))
    ways = {"recycling": (row.encode_seconds, seconds)} | {
        name: (0.0, factor * seconds) for name, factor in known.items()
    }
    values = [
        {"x": epochs, "y": begin + epochs * each, "of": way}
        for way, (begin, each) in ways.items()
        for epochs in (0, until)
    ]
    after = "It pays from the start of training on." if row.break_even_epoch == 1 else ""
    after = after or (
        "It was not seen to pay." if row.break_even_epoch is None else f"It pays after epoch {row.break_even_epoch}."
    )
    return _figure(
        f"Break-even of cut {row.cut}",
        f"Seconds spent after so many epochs, the encode included. {after}",
        charts.costs(values, list(ways)),
    )


def plain(text: str) -> str:
    """Return `text` without halves of characters, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def short(value: float) -> str:
    """Return a number with three decimals, or none where it is whole."""
    return format(value, ".0f" if float(value).is_integer() else ".3f")


def _cuts(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(str(run.cut) for run in sorted(runs, key=lambda run: run.recycled)))


def _value_of(run: Run, setting: str) -> Any:
    """Return the value of a setting in a run, that of params.yaml where the run did not replace it."""
    section, _, name = setting.partition(".")
    found = run.overrides[setting] if setting in run.overrides else run.made_of.get(section, {}).get(name)
    return found if isinstance(found, int | float | str | None) else json.dumps(found)


def _figure(title: str, text: str, spec: charts.Spec) -> Figure:
    return Figure(title, text, charts.to_svg(spec))
