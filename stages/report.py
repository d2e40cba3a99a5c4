"""Stage `report`: results/runs -> results/summary.json, a table and a plot."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.flow import report_project
from pipeline.project import Project
from pipeline.report import table
from stages.options import params_option


@click.command("report")
@params_option
def command(params: Path) -> None:
    """Write the result table and plot of all finished runs."""
    project = Project.load(params)
    click.echo(table(report_project(project)))
    click.echo(f"plot: {project.results / 'accuracy.png'}")
