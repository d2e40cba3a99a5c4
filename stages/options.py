"""Options and exit codes that several commands share."""

from pathlib import Path

import click

TOO_MANY_BAD = 3
"""Exit code where more samples are bad than `encode.max_bad` allows."""

params_option = click.option(
    "--params",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("params.yaml"),
    show_default=True,
    help="The file of settings.",
)
