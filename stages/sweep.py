"""`recycle sweep`: a grid, a list or a file of settings -> results/runs/<name> of each."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline import workflows
from pipeline.config import parse_choices, parse_override
from pipeline.errors import TrainError
from pipeline.files import write_whole
from pipeline.runs.planned import list_runs
from pipeline.runs.record import Run
from stages.options import params_option


@click.command("sweep")
@click.option("--cut", "cuts", multiple=True, help="One of encode.cuts; may be repeated.  [default: all of them]")
@click.option("--grid", multiple=True, metavar="SETTING=VALUE,VALUE", help="Values of a setting; all are combined.")
@click.option("--set", "settings", multiple=True, metavar="SETTING=VALUE", help="Replaces one of params.yaml.")
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="A YAML file with runs or a grid.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the runs.")
@click.option(
    "--stacked",
    is_flag=True,
    help="Train at once what differs only in train.lr, head_lr, weight_decay or seed: same scores within rounding.",
)
@click.option("--scores", type=click.Path(path_type=Path, dir_okay=False), help="Write all scores there, as JSON.")
@params_option
def command(
    params: Path,
    cuts: Sequence[str],
    grid: Sequence[str],
    settings: Sequence[str],
    file: Path | None,
    jobs: int,
    stacked: bool,
    scores: Path | None,
) -> None:
    """Train many runs in one process, each as `recycle train` does.

    As in --cut 0.5 --cut 1.0 --grid train.lr=1e-4,1e-3 --grid train.seed=0,1,2: twelve runs. FILE has `grid:` (setting:
    list of values) or `runs:` (a list of settings, `cut` among them). Finished runs are not trained again, and one that
    was killed goes on. The same command may be started any number of times at once: no run is trained twice.
    """
    runs = list_runs(cuts, dict(map(parse_choices, grid)), file)
    result = workflows.sweep.sweep_project(
        params, dict(map(parse_override, settings)), runs, jobs=jobs, stacked=stacked
    )
    click.echo(_table(result.best_first))
    if scores is not None:
        content = {run.name: {run.metric: run.value, "test": dict(run.test)} for run in result.finished}
        write_whole(scores, json.dumps(content, indent=2) + "\n")
    if result.elsewhere:
        click.echo(f"{len(result.elsewhere)} more are trained by other processes: {', '.join(result.elsewhere)}")
    if result.failed:
        messages = "\n".join(f"run {name}: {message}" for name, message in result.failed.items())
        raise TrainError(f"{len(result.failed)} of {len(runs)} runs failed:\n{messages}")


def _table(runs: Sequence[Run]) -> str:
    """Return a line per run."""
    width = max((len(run.name) for run in runs), default=0)
    return "\n".join(f"{run.name:{width}}  {run.metric} {run.value:.4f}  epoch {run.best_epoch}" for run in runs)
