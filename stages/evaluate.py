"""`recycle evaluate`: a finished run + labelled samples -> scores."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline import workflows
from pipeline.data import SPLITS
from pipeline.project import Project
from stages.options import TOO_MANY_BAD, params_option

if TYPE_CHECKING:
    from pipeline.workflows.evaluate import Evaluation


@click.command("evaluate")
@click.option("--run", "name", required=True, help="Its name: its cut, unless it was given another.")
@click.option("--input", "inputs", help="Other labelled data of the kind that data: describes.")
@click.option("--split", type=click.Choice(SPLITS), help="Score only this split; by default test, of --input all.")
@click.option("--live", is_flag=True, help="Also score the full model on the raw data, beside the scores from states.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@params_option
def command(params: Path, name: str, inputs: str | None, split: str | None, live: bool, as_json: bool) -> None:
    """Print the scores of a finished run on samples of the project, or on other labelled data.

    Samples that are in the run's store start from there, and only the others run the frozen layers; nothing is added to
    the store. Labels are those that the run was trained on. Exits with 3 when more samples of --input are bad than
    encode.max_bad allows.
    """
    evaluation, is_within = workflows.evaluate.evaluate_run(Project.load(params), name, inputs, split, live=live)
    click.echo(_as_json(evaluation) if as_json else _as_table(evaluation))
    if not is_within:
        sys.exit(TOO_MANY_BAD)


def _as_json(evaluation: "Evaluation") -> str:
    """Return the evaluation as JSON, with null for what cannot be computed."""
    content = asdict(evaluation) | {"largest_difference": evaluation.largest_difference}
    for kind in ("cached", "live"):
        content[kind] = {name: None if math.isnan(value) else value for name, value in content[kind].items()}
    return json.dumps(content, indent=2)


def _as_table(evaluation: "Evaluation") -> str:
    lines = [f"run {evaluation.run}, {evaluation.data}: {evaluation.samples} samples"]
    width = max(map(len, evaluation.cached), default=0)
    lines += [f"{'':{width}}    cached" + ("      live" if evaluation.live else "")]
    for name, value in evaluation.cached.items():
        live = f"{evaluation.live[name]:10.4f}" if evaluation.live else ""
        lines.append(f"{name:{width}}{value:10.4f}{live}")
    if evaluation.largest_difference is not None:
        lines.append(f"largest difference: {evaluation.largest_difference:.1e}")
    return "\n".join(lines)
