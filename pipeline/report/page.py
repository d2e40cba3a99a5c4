"""results/report.html: the finished runs as one file that needs no script and no network.

The template has autoescape on; only the charts are markup, and these escape their texts themselves.
"""

import csv
import json
import math
import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline.data import SPLITS, SampleTable, remarks
from pipeline.errors import RecyclingError
from pipeline.files import write_whole
from pipeline.project import Project
from pipeline.report import charts
from pipeline.report.costs import CutCost
from pipeline.report.samples import SHORT_TEXT, Samples
from pipeline.report.summary import BOUNDED, SEED, ResultRow, curves, table_cells
from pipeline.runs.record import STORE, Run
from pipeline.store import KeySet
from pipeline.tasks.config import LOWER_IS_BETTER

FILE = "report.html"
PLAN = "plan.json"
TEMPLATES = Path(__file__).parents[1] / "templates"
MEASURED = ("state_bytes_per_sample", "encode_seconds", "train_seconds_per_epoch", "break_even_epoch")
"""Costs that a plan predicts, too."""
MOST_REVIEWED = 6
"""Cuts of which the page shows mistakes: those with the best scores."""
MOST_BARS = 30
MOST_ROWS = 200
"""Rows of a table of classes; further ones are counted."""
PACKAGES = ("layer-recycling", "torch", "transformers", "timm", "torchvision", "zarr", "numpy", "dvc")


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    text: str
    svg: str
    """Markup: the template shows it as it is."""


def write_page(
    project: Project, rows: Sequence[ResultRow], runs: Sequence[Run], costs: Mapping[str, CutCost], notes: Sequence[str]
) -> Path:
    """Write the page of `runs`, whose table has `rows`; `notes` say what is missing. Return its path."""
    path = project.results / FILE
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "cost": _figure_of, "short": _short}
    samples, best = Samples(project), best_row(rows)
    reviewed, unread = _reviewed(project, runs, samples)
    more = [*unread, *([samples.problem] if samples.problem else [])]
    write_whole(
        path,
        environment.get_template("report.html").render(
            title=project.params.absolute().parent.name,
            project=project,
            best=best,
            runs=runs,
            table=table_cells(rows),
            notes=[*notes, *_unreviewed(runs), *more],
            curves=_curves(runs, costs),
            sweeps=_sweeps(runs),
            reviewed=reviewed,
            data=_data(project),
            bounded=BOUNDED if any(row.bounded for row in rows) else "",
            costs=_cost_table(project, rows),
            break_even=_break_even(best),
            versions=_versions(),
            recipes=_recipes(project),
            commands=_commands(runs),
        ),
    )
    return path


def best_row(rows: Sequence[ResultRow]) -> ResultRow:
    """Return the row with the best mean score; of equal ones, that which recycles most."""
    sign = -1 if rows[0].metric in LOWER_IS_BETTER else 1
    return max(rows, key=lambda row: (not math.isnan(row.value), sign * row.value, row.recycled))


def _cuts(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(str(run.cut) for run in sorted(runs, key=lambda run: run.recycled)))


def _figure(title: str, text: str, spec: charts.Spec) -> Figure:
    return Figure(title, text, charts.to_svg(spec))


def _curves(runs: Sequence[Run], costs: Mapping[str, CutCost]) -> list[Figure]:
    """Return the validation score against the seconds spent, and the training loss, a line for each run."""
    values, cuts = curves(runs, costs).to_dict("records"), _cuts(runs)
    score = charts.lines(values, cuts, "seconds", ("value", runs[0].metric.replace("_", " ")))
    loss = charts.lines(values, cuts, "epoch", ("loss", "training loss"))
    spent = "Validation score against the seconds spent until then, the encode included. A line for each run."
    return [
        _figure("Score and time", spent, score),
        _figure("Training loss", "Mean loss of each epoch. A line for each run.", loss),
    ]


def _sweeps(runs: Sequence[Run]) -> list[Figure]:
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


def _value_of(run: Run, setting: str) -> Any:
    """Return the value of a setting in a run, that of params.yaml where the run did not replace it."""
    section, _, name = setting.partition(".")
    found = run.overrides[setting] if setting in run.overrides else run.made_of.get(section, {}).get(name)
    return found if isinstance(found, int | float | str | None) else json.dumps(found)


def _reviewed(project: Project, runs: Sequence[Run], samples: Samples) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the reviews of the best run of each cut, best first, with the samples that they name; and notes of those
    that another version wrote in a way that cannot be read.
    """
    sign = -1 if runs[0].metric in LOWER_IS_BETTER else 1
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (-sign * run.value, run.name)):
        if run.review:
            best.setdefault(str(run.cut), run)
    found, unread = list[dict[str, Any]](), list[str]()
    for run in list(best.values())[:MOST_REVIEWED]:
        try:
            found.append(_review(project, run, samples))
        except (KeyError, TypeError, ValueError) as error:
            unread.append(f"The mistakes of run {run.name} cannot be read ({error!r}); train it again to see them.")
    return found, unread


def _review(project: Project, run: Run, samples: Samples) -> dict[str, Any]:
    table, review = project.overridden(run.overrides).training_table(), run.review

    def shown(mistake: Mapping[str, Any]) -> dict[str, Any]:
        near = [
            dict(one) | {"sample": samples.show(table, one["row"], longest=SHORT_TEXT)} for one in mistake["neighbours"]
        ]
        return dict(mistake) | {"sample": samples.show(table, mistake["row"], mistake["marks"]), "neighbours": near}

    classes = review.get("classes", [])
    return {
        "run": run,
        "figures": _review_figures(review),
        "review": review,
        "classes": classes[:MOST_ROWS],
        "more_classes": len(classes[MOST_ROWS:]),
        "mistakes": [shown(mistake) for mistake in review["mistakes"]],
        "marked": any(mistake["marks"] for mistake in review["mistakes"]),
    }


def _review_figures(review: Mapping[str, Any]) -> list[Figure]:
    figures = []
    if counted := review.get("confusion"):
        spec, shown = charts.confusion([_plain(label) for label in counted["labels"]], counted["counts"])
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


def _unreviewed(runs: Sequence[Run]) -> list[str]:
    """Return a note of the runs without a review, if there are any."""
    names = [run.name for run in runs if not run.review]
    if not names:
        return []
    return [
        f"No mistakes are shown of {', '.join(names)}: an earlier version trained them, or their task has no review."
    ]


def _data(project: Project) -> dict[str, Any]:
    """Return the summary of the sample table: splits, labels, duplicates, samples that were set aside."""
    table = SampleTable.read(project.samples)
    first = KeySet(table.keys).find(table.keys)
    try:
        with project.quarantine.open(encoding="utf-8", newline="") as file:
            bad = max(0, sum(1 for _ in csv.reader(file)) - 1)
    except OSError:
        bad = None
    return {
        "splits": [
            (split, len(rows), len(rows) - len(np.unique(first[rows])))
            for split in SPLITS
            for rows in [table.rows(split)]
        ],
        "samples": len(table),
        "repeated": len(table) - len(np.unique(first)),
        "remarks": remarks(table),
        "bad": bad,
        "figure": _labels(table),
    }


def _labels(table: SampleTable) -> Figure | None:
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
        (split, _plain(label)) for split, of in zip(table.split.tolist(), kinds, strict=True) for label in of
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


def _cost_table(project: Project, rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Return what each cut costs, as a plan predicted it, if one did, and as it was measured; None is unknown."""
    planned, found = _planned(project.results / PLAN), list[dict[str, Any]]()
    for row in {str(row.cut): row for row in reversed(rows)}.values():  # the first of each cut
        measured = {name: getattr(row, name) for name in MEASURED}
        figures = [(planned.get(str(row.cut), {}).get(name), value) for name, value in measured.items()]
        found.append({"cut": str(row.cut), "figures": figures})
    return {"planned": bool(planned), "rows": found[::-1]}


def _planned(path: Path) -> dict[str, dict[str, float | None]]:
    """Return what a plan predicts for each cut, by the names of `MEASURED`; empty where none can be read."""
    try:
        cuts = json.loads(path.read_text(encoding="utf-8"))["forecast"]["cuts"]
        return {
            str(cut["cut"]): {
                "state_bytes_per_sample": cut["state_bytes"] / max(1, cut["samples"]),
                "encode_seconds": cut["encode_seconds"],
                "train_seconds_per_epoch": cut["epoch_seconds"],
                "break_even_epoch": cut["frozen_seconds"]
                and math.floor(cut["encode_seconds"] / cut["frozen_seconds"]) + 1,
            }
            for cut in cuts
        }
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _break_even(row: ResultRow) -> Figure | None:
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


def _versions() -> list[tuple[str, str]]:
    """Return the versions of Python and of packages that are installed here."""
    found = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _recipes(project: Project) -> list[tuple[str, str, str]]:
    """Return name, digest and content of the recipe of each store; a store that cannot be read says why."""
    found = []
    for part in project.parts:
        for cut in project.encode.cuts:
            name = part.store_name(part.at(cut))
            try:
                recipe = part.open_store(part.at(cut)).recipe
                found.append((name, recipe.digest, recipe.to_json()))
            except (RecyclingError, OSError) as error:
                found.append((name, "", str(error)))
    return list(dict.fromkeys(found))


def _commands(runs: Sequence[Run]) -> list[str]:
    """Return the commands that repeat the runs."""
    train = []
    for run in runs:
        replaced = [f"--set {shlex.quote(f'{name}={_yaml(value)}')}" for name, value in sorted(run.overrides.items())]
        train.append(
            " ".join([f"recycle train --cut {shlex.quote(str(run.cut))} --name {shlex.quote(run.name)}", *replaced])
        )
    return ["recycle encode", *train, "recycle report"]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _short(value: float) -> str:
    return format(value, ".0f" if float(value).is_integer() else ".3f")


def _figure_of(value: float | None) -> str:
    """Return a cost with four digits, or all of those before the point."""
    return _number(value, ",.0f" if value is not None and abs(value) >= 1000 else ".4g")


def _plain(text: str) -> str:
    """Return `text` without halves of characters, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
