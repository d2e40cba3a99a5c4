"""`recycle init`: a data set -> params.yaml, dvc.yaml."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline import workflows
from pipeline.config import parse_override


@click.command("init")
@click.argument("data", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--task", metavar="KIND", help="As task.kind.")
@click.option("--backbone", metavar="NAME", help="As model.backbone.")
@click.option("--template", metavar="NAME", help="Take the settings of one of the examples, such as cars or faq.")
@click.option("--set", "settings", multiple=True, metavar="SETTING=VALUE", help="A setting to write.")
@click.option("--git", is_flag=True, help="Run git init if this is no git repository.")
@click.option("--dvc", is_flag=True, help="Run dvc init if this is no DVC repository.")
def command(
    data: Path | None,
    task: str | None,
    backbone: str | None,
    template: str | None,
    settings: Sequence[str],
    git: bool,
    dvc: bool,
) -> None:
    """Look at DATA and write params.yaml and dvc.yaml for it into the current folder.

    DATA is a folder of images or sounds (a folder per class, or a table that names the files), a table (CSV, TSV, JSON
    Lines, JSON, Parquet) of texts or pairs, CoNLL files, or SQuAD's JSON. Its fields, the task and a backbone that is
    installed are proposed; in a terminal you are asked. Stores and data never enter git: .gitignore and .dvcignore get
    the lines they lack. No file is replaced.
    """
    init = workflows.init
    asks = init.Choices(_choose, lambda question: click.confirm(question, default=True)) if sys.stdin.isatty() else None
    overrides = dict(map(parse_override, settings))
    named = {"task": task, "backbone": backbone, "template": template}
    click.echo(init.init_project(data, **named, overrides=overrides, git=git, dvc=dvc, choices=asks))


def _choose(question: str, options: Sequence[str]) -> str:
    for number, option in enumerate(options[1:], 2):
        click.echo(f"  {question} {number}: {option}")
    answer: str = click.prompt(question, default=options[0])
    return options[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(options) else answer
