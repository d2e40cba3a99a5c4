"""`recycle`: the stages of dvc.yaml and the other verbs, each imported only when it is called."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


KEPT = {
    "encode": "the segments that were written are kept, and the next run encodes the rest",
    "train": "the epochs that ended are kept, and the same command goes on from the last of them",
    "predict": "no predictions were written; states that --write stored are kept, and the next run reads them",
}
"""What there is after a command was interrupted, and what the next run does."""


def main(args: Sequence[str] | None = None) -> None:
    """Run `recycle`.

    An error raised on purpose, or by a disk, is one message and exit code 1; Ctrl-C and SIGTERM are one message and
    exit code 130 or 143.
    """
    with _noted_signals() as signals:
        try:
            sys.exit(recycle(args=args, prog_name="recycle", standalone_mode=False) or 0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, Exception) as error:
            if isinstance(error, click.Abort) or signals:  # a worker process that heard it first may have died
                _tell_of_interruption(sys.argv[1:] if args is None else args)
                sys.exit(128 + (signals or [signal.SIGINT])[0])
            message = _message(error)
            if message is None:
                raise
            click.echo(f"recycle: {message}", err=True)
            sys.exit(1)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt; give the list of those that came.

    Where they are ignored, as by a shell's background jobs, or somebody else sees to them, this stays so. Of several
    processes that train as one, torchrun ends each.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    if "RANK" not in os.environ:
        usual[signal.SIGTERM] = signal.SIG_DFL
    taken = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    if threading.current_thread() is not threading.main_thread():
        taken = {}
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def _tell_of_interruption(args: Sequence[str]) -> None:
    kept = next((KEPT[arg] for arg in args if arg in KEPT), "run it again")
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"recycle: interrupted; {kept}", err=True)


def _message(error: Exception) -> str | None:
    """Return what to say of an error that was raised on purpose, or by a disk; None of any other."""
    if isinstance(error, RecyclingError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}; make room there, or give access, and run again"
    return None


if __name__ == "__main__":
    main()
