"""`recycle plan`: what an encode and runs of every cut will cost, before any of it is paid."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from pipeline import workflows
from pipeline.project import Project
from stages.options import params_option


@click.command("plan")
@params_option
@click.option("--runs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs that share the states.")
@click.option("--apply", is_flag=True, help="Write the recommended settings to the file of settings.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def command(params: Path, runs: int, apply: bool, as_json: bool) -> None:
    """Predict disk and time of every cut from a sample, try settings, and say whether to cache.

    Takes about a minute, stores no state, and keeps what it measured for the next time. The predictions are written to
    results/plan.json, and recycle report shows them beside what was measured.
    """
    from pipeline.workflows.plan_text import text  # noqa: PLC0415  (slow to import)

    plan = workflows.plan.plan_project(Project.load(params), apply=apply)
    click.echo(json.dumps(asdict(plan), indent=2) if as_json else text(plan, runs=runs, applied=apply))
