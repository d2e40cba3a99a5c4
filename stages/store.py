"""`recycle store`: what stores hold, whether it is sound, what can go."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pipeline.project import Project
from pipeline.project.stores import local_stores, open_store, stores_of
from pipeline.store import describe, plan_compact
from pipeline.workflows.store_upkeep import (
    Dialog,
    carry_out,
    collect_garbage,
    describe_store,
    remove_samples,
    verify_stores,
)
from stages.options import params_option


class StorePlace(click.Path):
    """A folder that exists, as a Path; or a URL, as a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what was given, checked."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


stores_argument = click.argument("stores", nargs=-1, type=StorePlace(path_type=Path, exists=True, file_okay=False))
yes_option = click.option("--yes", is_flag=True, help="Do it without asking.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
keep_option = click.option(
    "--keep",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A further sample table whose samples stay; may be given several times.",
)


@click.group("store")
def command() -> None:
    """Look after stores: what they hold, whether it is sound, what can go.

    STORES are folders of stores, for info and verify also URLs (s3://BUCKET/PREFIX/CUT); without any, all stores of the
    cuts in the settings' file are meant. Commands that remove something say first what, and ask.
    """


@command.command("info")
@stores_argument
@params_option
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def info(stores: tuple[Path | str, ...], params: Path, as_json: bool) -> None:
    """Print what stores contain, which samples they lack, and whether compact or gc would help."""
    project = Project.load(params)
    opened = [open_store(project, place, named=bool(stores)) for place in stores or stores_of(project)]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(describe(store)) for store in opened], indent=2))
        return
    for store in opened:
        for line in describe_store(project, store):
            click.echo(line)


@command.command("verify")
@stores_argument
@params_option
def verify_command(stores: tuple[Path | str, ...], params: Path) -> None:
    """Read every byte of stores and compare it with what was written: every checksum, every key.

    Exits with 1 if there are faults, one line for each.
    """
    _exit_on(verify_stores(Project.load(params), stores, _dialog()))
    click.echo("sound")


@command.command("gc")
@stores_argument
@params_option
@keep_option
@click.option("--rewrite", "rewrites", is_flag=True, help="Also take unused samples out of segments that others use.")
@click.option("--cuts", is_flag=True, help="Also remove stores of cuts, views and towers not named in the settings.")
@yes_option
@dry_run_option
def gc(
    stores: tuple[Path | str, ...],
    params: Path,
    keep: tuple[Path, ...],
    rewrites: bool,
    cuts: bool,
    yes: bool,
    dry_run: bool,
) -> None:
    """Remove what no sample table refers to: whole segments, and what killed writers left.

    Segments that are not older than data/samples.parquet stay: they may belong to an interrupted encode that will be
    continued.
    """
    project = Project.load(params)
    paths = local_stores(project, stores, "gc")
    _exit_on(collect_garbage(project, paths, keep, _dialog(yes, dry_run), rewrite=rewrites, cuts=cuts))


@command.command("compact")
@stores_argument
@params_option
@click.option("--target-samples", type=click.IntRange(min=2), help="Default: encode.segment_samples.")
@yes_option
@dry_run_option
def compact(stores: tuple[Path | str, ...], params: Path, target_samples: int | None, yes: bool, dry_run: bool) -> None:
    """Merge small segments, below half the target, into larger ones; no stored bit changes."""
    project = Project.load(params)
    target = target_samples or project.encode.segment_samples
    paths = local_stores(project, stores, "compact")
    faults = carry_out(paths, lambda store: plan_compact(store.path, store.recipe, target), _dialog(yes, dry_run))
    _exit_on(faults or [])


@command.command("rm-samples")
@click.argument("keys", nargs=-1)
@params_option
@click.option("--from", "listed", type=click.File(), help="A file with a key on every line; - for the standard input.")
@click.option("--source", "sources", multiple=True, help="As the sample table names it; may be given several times.")
@yes_option
@dry_run_option
def rm_samples(
    keys: tuple[str, ...],
    params: Path,
    listed: Iterable[str] | None,
    sources: tuple[str, ...],
    yes: bool,
    dry_run: bool,
) -> None:
    """Remove samples from every store of the project, also of former cuts, from the sample table and the quarantine.

    KEYS are sample keys in hex. The raw data, finished runs, and earlier versions in DVC's cache and remotes are not
    changed.
    """
    project = Project.load(params)
    local_stores(project, [], "rm-samples")
    wanted = [*keys, *(line.strip() for line in listed or () if line.strip())]
    _exit_on(remove_samples(project, wanted, sources, _dialog(yes, dry_run)))


@command.command("error")
@click.option("--cut", "cuts", multiple=True, help="One of encode.cuts; may be given several times. Default: all.")
@click.option("--keys", "count", type=click.IntRange(min=2), default=256, show_default=True, help="Samples to try.")
@params_option
def error(cuts: tuple[str, ...], count: int, params: Path) -> None:
    """Print the size and the error of each codec, in states and in the outputs of the layers after the cut.

    Nothing is written. Errors are relative to the current content of the store.
    """
    from pipeline.workflows.codec_error import measure, table  # noqa: PLC0415 the model's libraries are slow to import

    project = Project.load(params)
    for cut in cuts or [str(cut) for cut in project.encode.cuts]:
        for part in project.parts:
            click.echo(table(measure(project, cut, count, part.tower)))


@command.command("export")
@click.argument("store", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--format", "form", type=click.Choice(["parquet", "npz", "h5", "safetensors"]), help="Default: by OUT.")
@click.option("--split", help="A data set of the store, where the library encoded several.")
@click.option("--samples", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A sample table.")
def export(store: Path, out: Path, form: str | None, split: str | None, samples: Path | None) -> None:
    """Write the keys and states of STORE to the file OUT, with the targets of a sample table, if it is given."""
    from pipeline.library.states import export_states, open_states  # noqa: PLC0415 (torch is slow to import)

    states = open_states(store, split, samples)
    export_states(states, out, form)
    click.echo(f"{len(states)} items in {out}")


def _dialog(yes: bool = False, dry_run: bool = False) -> Dialog:
    def progress(label: str, unit: str) -> Any:
        return lambda items: tqdm(items, desc=label, unit=unit, disable=None)

    return Dialog(click.echo, lambda: yes or click.confirm("Do it?"), progress, changes=not dry_run)


def _exit_on(faults: Sequence[str]) -> None:
    for fault in faults:
        click.echo(fault)
    if faults:
        sys.exit(1)
