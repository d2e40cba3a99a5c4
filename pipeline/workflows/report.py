"""Report: finished runs -> the result table, the curves and the plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from pipeline.files import write_whole
from pipeline.project import Project
from pipeline.report.costs import read_costs
from pipeline.report.summary import ResultRow, curves, plot, summarise
from pipeline.runs.record import current_runs


def report_project(project: Project) -> Sequence[ResultRow]:
    """Write the table, the curves and the plot of the finished runs that are current; log which are left out.

    Raises:
        DataError: no run is current.
    """
    costs, finished = read_costs(project), current_runs(project)
    rows = summarise(finished, costs)
    write_whole(project.results / "summary.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    curves(finished, costs).to_csv(project.results / "curves.csv", index=False)
    plot(finished, costs, project.results / "runs.png")
    return rows
