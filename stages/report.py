"""Stage `report`: results/runs -> results/summary.json, a table, a plot and a page."""

from pathlib import Path

import click

from pipeline.project import Project
from pipeline.report.forecast import comparison
from pipeline.report.page import FILE
from pipeline.report.summary import table
from pipeline.workflows.report import report_project
from stages.options import params_option


@click.command("report")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@params_option
def command(params: Path, markdown: bool, opens: bool) -> None:
    """Write the result table, the plot and the page of all finished runs.

    The page, results/report.html, is one file without scripts, for any browser. A row of the table is the mean of the
    runs that differ in their seed alone, with the standard deviation between them.
    """
    project = Project.load(params)
    rows = report_project(project)
    click.echo(table(rows, markdown=markdown))
    if (predicted := comparison(project, rows, markdown=markdown)) is not None:
        click.echo(f"\n{predicted}")
    page = project.results / FILE
    click.echo(f"plot: {project.results / 'runs.png'}, page: {page}", err=markdown)
    if opens:
        click.launch(str(page.absolute()))
