"""Report: finished runs -> the result table, the curves, the plot and the page."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict

from pipeline.files import write_whole
from pipeline.project import Project
from pipeline.report.costs import read_costs
from pipeline.report.page import write_page
from pipeline.report.summary import ResultRow, curves, plot, summarise
from pipeline.runs.record import current_runs

log = logging.getLogger("recycle")


def report_project(project: Project) -> Sequence[ResultRow]:
    """Write the table, the curves, the plot and the page of the finished runs that are current; log what is missing.

    Raises:
        DataError: no run is current.
    """
    costs, (finished, missing) = read_costs(project), current_runs(project)
    for line in missing:
        log.warning("%s", line)
    rows = summarise(finished, costs)
    write_whole(project.results / "summary.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    curves(finished, costs).to_csv(project.results / "curves.csv", index=False)
    plot(finished, costs, project.results / "runs.png")
    write_page(project, rows, finished, costs, missing)
    return rows
