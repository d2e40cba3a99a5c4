"""Stage `report`: results/runs -> results/summary.json, a table and a plot."""

from pathlib import Path

import click

from pipeline.project import Project
from pipeline.report.forecast import comparison
from pipeline.report.summary import table
from pipeline.workflows.report import report_project
from stages.options import params_option


@click.command("report")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@params_option
def command(params: Path, markdown: bool) -> None:
    """Write the result table and plot of all finished runs.

    A row is the mean of the runs that differ in their seed alone, with the standard deviation between them.
    """
    project = Project.load(params)
    rows = report_project(project)
    click.echo(table(rows, markdown=markdown))
    if (predicted := comparison(project, rows, markdown=markdown)) is not None:
        click.echo(f"\n{predicted}")
    click.echo(f"plot: {project.results / 'runs.png'}", err=markdown)
