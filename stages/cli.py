"""`recycle`: the stages of dvc.yaml and the other verbs, each imported only when it is called."""

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
from pipeline.memory import import_for_good, keep_freed_memory

COMMANDS = {
    "init": "stages.init:command",
    "cuts": "stages.cuts:command",
    "plan": "stages.plan:command",
    "encode": "stages.encode:command",
    "train": "stages.train:command",
    "sweep": "stages.sweep:command",
    "report": "stages.report:command",
    "export": "stages.export:command",
    "predict": "stages.predict:command",
    "evaluate": "stages.evaluate:command",
    "fetch": "stages.fetch:command",
    "store": "stages.store:command",
    "adopt": "stages.adopt:command",
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
        command: click.Command = getattr(import_for_good(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the first line of their modules' docstrings, still without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])


SUMMARIES = {
    "init": "Look at a data set and write params.yaml and dvc.yaml for it.",
    "cuts": "List every place to cut a model, with its costs and the speed-up to expect; mark the sensible ones.",
    "plan": "Predict disk and time of every cut from a sample, try settings, and say whether to cache.",
    "encode": "Run the frozen layers once over the data set and store what they give.",
    "train": "Fine-tune the layers above one cut from its store.",
    "sweep": "Train many runs in one process: a grid, a list or a file of settings.",
    "report": "Write the result table and plot of all finished runs.",
    "export": "Write a finished run as a plain model, proved to give the same outputs.",
    "predict": "Write what finished runs say of a data set; samples in the store start from there.",
    "evaluate": "Score a finished run on a split, or on other labelled data; with --live, the full model too.",
    "fetch": "Copy a file out of an installed package, checking its digest.",
    "store": "Look after stores: what they hold, whether it is sound, what can go.",
    "adopt": "Put features that another program made into a store.",
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
    "sweep": "finished runs and epochs are kept, and the same command goes on from there",
    "predict": "no predictions were written; states that --write stored are kept, and the next run reads them",
}
"""What an interrupted command keeps, and what the next run does."""


def main(args: Sequence[str] | None = None) -> None:
    """Run `recycle`.

    A deliberate error, or one of the file system, prints one message and exits with 1; Ctrl-C and SIGTERM print one
    message and exit with 130 or 143.
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
    """Make SIGINT and SIGTERM raise KeyboardInterrupt; give the list of signals received.

    Signals that are ignored, as in background jobs of a shell, or have another handler, stay so. Torchrun ends each of
    several training processes.
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
    """Return the message of a deliberate error or one of the file system; None for any other."""
    if isinstance(error, RecyclingError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}; make room there, or give access, and run again"
    return None


if __name__ == "__main__":
    main()
