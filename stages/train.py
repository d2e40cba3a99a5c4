"""Stage `train`: store + sample table -> results/runs/<cut>."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.flow import train_project
from pipeline.project import Project
from stages.options import params_option


@click.command("train")
@click.option("--cut", required=True, help="One of encode.cuts.")
@params_option
def command(params: Path, cut: str) -> None:
    """Fine-tune the layers above one cut from its store.

    A run that was killed goes on from its last whole epoch.
    """
    train_project(Project.load(params), cut)
