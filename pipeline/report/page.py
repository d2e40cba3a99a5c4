"""results/report.html: the finished runs as one file that needs no script and no network.

The template has autoescape on; only the charts are markup, and these escape their texts themselves.
"""

import csv
import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline.data import SPLITS, SampleTable, remarks
from pipeline.errors import RecyclingError
from pipeline.files import write_whole
from pipeline.project import Project
from pipeline.report.costs import CutCost
from pipeline.report.figures import (
    break_even_figure,
    curve_figures,
    label_figure,
    review_figures,
    short,
    sweep_figures,
)
from pipeline.report.forecast import MEASURED, read_forecast
from pipeline.report.samples import SHORT_TEXT, Samples
from pipeline.report.summary import BOUNDED, ResultRow, table_cells
from pipeline.runs.record import Run
from pipeline.store import KeySet
from pipeline.tasks.config import LOWER_IS_BETTER

FILE = "report.html"
TEMPLATES = Path(__file__).parents[1] / "templates"
MOST_REVIEWED = 6
"""Cuts of which the page shows mistakes: those with the best scores."""
MOST_ROWS = 200
"""Rows of a table of classes; further ones are counted."""
PACKAGES = ("layer-recycling", "torch", "transformers", "timm", "torchvision", "zarr", "numpy", "dvc")


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
    environment.filters |= {"number": _number, "cost": _figure_of, "short": short}
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
            curves=curve_figures(runs, costs),
            sweeps=sweep_figures(runs),
            reviewed=reviewed,
            data=_data(project),
            bounded=BOUNDED if any(row.bounded for row in rows) else "",
            costs=_cost_table(project, rows),
            break_even=break_even_figure(best),
            versions=_versions(),
            recipes=_recipes(project),
            commands=_commands(runs),
            settings=[(run.name, json.dumps(run.made_of, indent=1)) for run in runs],
        ),
    )
    return path


def best_row(rows: Sequence[ResultRow]) -> ResultRow:
    """Return the row with the best mean score; of equal ones, that which recycles most."""
    sign = -1 if rows[0].metric in LOWER_IS_BETTER else 1
    return max(rows, key=lambda row: (not math.isnan(row.value), sign * row.value, row.recycled))


def _reviewed(project: Project, runs: Sequence[Run], samples: Samples) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the reviews of the best run of each cut, best first, with the samples that they name; and notes of those
    that another version wrote in a way that cannot be read.
    """
    sign = -1 if runs[0].metric in LOWER_IS_BETTER else 1
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (-sign * run.value, -run.recycled, run.name)):
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
        "figures": review_figures(review),
        "review": review,
        "classes": classes[:MOST_ROWS],
        "more_classes": len(classes[MOST_ROWS:]),
        "mistakes": [shown(mistake) for mistake in review["mistakes"]],
        "marked": any(mistake["marks"] for mistake in review["mistakes"]),
    }


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
        "figure": label_figure(table),
    }


def _cost_table(project: Project, rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Return what each cut costs, as a plan predicted it, if one did, and as it was measured; None is unknown.

    Of several rows of a cut, the first one with the settings of params.yaml counts, which a plan is for.
    """
    forecast, found = read_forecast(project), list[dict[str, Any]]()
    planned = {} if forecast is None else {str(cut.cut): cut.predicted() for cut in forecast.cuts}
    rows_of = {str(row.cut): [one for one in rows if str(one.cut) == str(row.cut)] for row in rows}
    for row in (min(of_cut, key=lambda one: bool(one.settings)) for of_cut in rows_of.values()):
        figures = [(planned.get(str(row.cut), {}).get(name), getattr(row, name)) for name in MEASURED]
        found.append({"cut": str(row.cut), "figures": figures})
    return {"planned": bool(planned), "rows": found}


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


def _figure_of(value: float | None) -> str:
    """Return a cost with three digits, or all of those before the point."""
    return _number(value, ",.0f" if value is not None and abs(value) >= 100 else ".3g")
