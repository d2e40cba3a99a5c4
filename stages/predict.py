"""`recycle predict`: finished runs + inputs -> their predictions."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline import workflows
from pipeline.project import Project
from stages.options import TOO_MANY_BAD, params_option


@click.command("predict")
@click.option("--model", "models", required=True, multiple=True, help="A finished run; may be given several times.")
@click.option("--input", "inputs", default="-", show_default=True, help="Data of the kind that data: describes.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="A .parquet or .jsonl file."
)
@click.option("--write", is_flag=True, help="Keep the states of new samples in the store.")
@click.option("--tower", help="The role whose encoder is asked, anchor or positive, where there are towers.")
@params_option
def command(params: Path, models: Sequence[str], inputs: str, output: Path, write: bool, tower: str | None) -> None:
    """Write what finished runs say of every input, a row for each, in their order.

    The input needs no labels: a folder of images, a table without its labels' column. "-" is the data set of
    params.yaml. Samples that are in a run's store start from there, and only the others run the frozen layers; runs on
    one store share them. A bad sample has a row that says why; exits with 3 when more are bad than encode.max_bad
    allows.
    """
    project, path = Project.load(params), None if inputs == "-" else inputs
    if not workflows.predict.predict_project(project, models, path, output, write=write, tower=tower):
        sys.exit(TOO_MANY_BAD)
