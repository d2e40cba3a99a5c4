"""Stage `encode`: raw data -> data/activations, data/samples.parquet."""

import sys
from pathlib import Path

import click

from pipeline.project import Project
from pipeline.workflows.encode import encode_project
from stages.options import TOO_MANY_BAD, params_option


@click.command("encode")
@params_option
@click.option("--rehash", is_flag=True, help="Read every file again, also those that look unchanged.")
@click.option("--replace", is_flag=True, help="Remove stores that were made under other settings; see encode.replace.")
def command(params: Path, rehash: bool, replace: bool) -> None:
    """Run the frozen layers once over the data set and store what they give.

    Samples already in a store are not encoded again, and files that did not change (size, mtime, inode) are not even
    read. Exits with 3 when more samples are bad than encode.max_bad allows; the good ones are stored all the same, and
    data/quarantine.csv says what is wrong with the others. A store that was made under other settings is not touched
    unless --replace allows to remove it.
    """
    if not encode_project(Project.load(params), rehash=rehash, replace_stores=replace):
        sys.exit(TOO_MANY_BAD)
