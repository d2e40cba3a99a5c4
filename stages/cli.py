"""`recycle`: the stages of dvc.yaml and the other verbs, each imported only when it is called."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

import click

from pipeline.errors import RecyclingError
from pipeline.memory import keep_freed_memory

COMMANDS = {
    "cuts": "stages.cuts:command",
    "encode": "stages.encode:command",
    "train": "stages.train:command",
    "report": "stages.report:command",
    "export": "stages.export:command",
    "predict": "stages.predict:command",
    "fetch": "stages.fetch:command",
    "store": "stages.store:command",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when called: `recycle --help` loads no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the first line of their modules' docstrings, still without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])


SUMMARIES = {
    "cuts": "List every place to cut a model, with its costs and the speed-up to expect; mark the sensible ones.",
    "encode": "Run the frozen layers once over the data set and store what they give.",
    "train": "Fine-tune the layers above one cut from its store.",
    "report": "Write the result table and plot of all finished runs.",
    "export": "Write a finished run as a plain model, proved to give the same outputs.",
    "predict": "Write what finished runs say of a data set; samples in the store start from there.",
    "fetch": "Copy a file out of an installed package, checking its digest.",
    "store": "Look after stores: what they hold, whether it is sound, what can go.",
}


@click.group(cls=LazyGroup)
@click.version_option(package_name="layer-recycling")
def recycle() -> None:
    """Fine-tuning that never runs a frozen layer twice."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("recycle").setLevel(logging.INFO)
    keep_freed_memory()


def main(args: Sequence[str] | None = None) -> None:
    """Run `recycle`; an error raised on purpose, or by a disk, is one message and exit code 1."""
    try:
        recycle(args=args, prog_name="recycle", standalone_mode=True)
    except RecyclingError as error:
        click.echo(f"recycle: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(
            f"recycle: {place}{error.strerror or error}; make room there, or give access, and run again", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
