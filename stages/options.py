"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

params_option = click.option(
    "--params",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("params.yaml"),
    show_default=True,
    help="The file of settings.",
)
