"""`recycle store`: what stores hold, whether it is sound, what can go."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from pipeline.data import SampleTable
from pipeline.errors import StoreError
from pipeline.project import Project
from pipeline.store import (
    Store,
    UpkeepPlan,
    apply_changes,
    describe,
    exclusive_access,
    find_stores,
    folder_nbytes,
    format_bytes,
    format_facts,
    own_entries,
    plan_compact,
    plan_gc,
    plan_removal,
    remove_store,
    sweep,
    verify,
)
from pipeline.workflows.store_upkeep import (
    find_samples,
    forget,
    local_stores,
    open_store,
    rewrite,
    stores_of,
    unnamed_stores,
    used_by,
    wanted_keys,
    without,
)
from stages.options import params_option

Item = TypeVar("Item")


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
    """Say what stores hold, what their data set lacks in them, and whether compact or gc would help."""
    project = Project.load(params)
    opened = [open_store(project, place, named=bool(stores)) for place in stores or stores_of(project)]
    if as_json:
        click.echo(json.dumps([describe(store).json() for store in opened], indent=2))
        return
    for store in opened:
        for line in format_facts(describe(store)):
            click.echo(line)
        if store.remote is None:
            compact = plan_compact(store.path, store.recipe, project.encode.segment_samples)
            if compact.changes:
                click.echo(f"  compact: {_becoming(compact)}")
        if not project.samples.exists():
            continue
        lacking = store.missing(wanted_keys(project, store.path))
        click.echo(f"  of {project.samples} it has {(~lacking).sum():,} of {len(lacking):,} samples")
        if store.remote is not None:
            continue
        used = used_by(project.samples, [])
        garbage = plan_gc(store.path, used.keys, used.written, rewrite=True)
        if garbage.changes:
            click.echo(f"  gc --rewrite: frees {_freed(garbage)}")


@command.command("verify")
@stores_argument
@params_option
def verify_command(stores: tuple[Path | str, ...], params: Path) -> None:
    """Read every byte of stores and compare it with what was written: every checksum, every key.

    Exits with 1 if there are faults, one line for each.
    """
    faults = []
    project = Project.load(params)
    for place in stores or stores_of(project):
        try:
            store = open_store(project, place, named=bool(stores))
            faults += verify(store, _progress(f"verify {store.where}", "segment"))
        except StoreError as error:
            faults.append(str(error))
    for fault in faults:
        click.echo(fault)
    if faults:
        sys.exit(1)
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

    Segments that are not older than data/samples.parquet stay, whatever they hold: they may be those of an encode that
    was stopped and will go on.
    """
    project = Project.load(params)
    paths = local_stores(project, stores, "gc")
    used = used_by(project.samples, keep)
    removed = unnamed_stores(project) if cuts else []
    if cuts and not dry_run:
        for folder in {project.activations, *(path.parent for path in removed)}:
            sweep(folder)
    _carry_out(
        paths,
        lambda store: plan_gc(store.path, used.keys, used.written, rewrite=rewrites),
        yes=yes,
        dry_run=dry_run,
        removed=removed,
    )


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
    _carry_out(
        local_stores(project, stores, "compact"),
        lambda store: plan_compact(store.path, store.recipe, target),
        yes=yes,
        dry_run=dry_run,
    )


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
    """Take samples out of every store of the project, of former cuts too, out of the sample table and the quarantine.

    KEYS are sample keys in hex. The raw data, finished runs, and earlier versions in DVC's cache and remotes are not
    touched.
    """
    project = Project.load(params)
    local_stores(project, [], "rm-samples")
    table = SampleTable.read(project.samples)
    unwanted = find_samples(table, [*keys, *(line.strip() for line in listed or () if line.strip())], sources)
    smaller = without(table, unwanted)
    click.echo(f"{project.samples}: {len(table) - len(smaller):,} of {len(table):,} rows go")
    done = _carry_out(
        find_stores(project.activations),
        lambda store: plan_removal(store.path, unwanted),
        yes=yes,
        dry_run=dry_run,
        also=len(smaller) < len(table),
    )
    if done:
        rewrite(smaller, project.samples)
        forget(project, unwanted)
        click.echo(
            "Remove these samples from the data set too, or the next encode brings them back. What DVC keeps of "
            "earlier versions goes with `dvc commit` and then `dvc gc --workspace`, of a remote with --cloud."
        )


@command.command("error")
@click.option("--cut", "cuts", multiple=True, help="One of encode.cuts; may be given several times. Default: all.")
@click.option("--keys", "count", type=click.IntRange(min=2), default=256, show_default=True, help="Samples to try.")
@params_option
def error(cuts: tuple[str, ...], count: int, params: Path) -> None:
    """Tell what each codec would cost and change, in states and in the outputs of the layers after the cut.

    Nothing is written. The deviations are those from what the store gives now.
    """
    from pipeline.workflows.codec_error import measure, table  # noqa: PLC0415 the model's libraries are slow to import

    project = Project.load(params)
    for cut in cuts or [str(cut) for cut in project.encode.cuts]:
        for part in project.parts:
            click.echo(table(measure(project, cut, count, part.tower)))


def _carry_out(
    paths: Sequence[Path],
    plan: Callable[[Store], UpkeepPlan],
    *,
    yes: bool,
    dry_run: bool,
    removed: Sequence[Path] = (),
    also: bool = False,
) -> bool:
    """Say what `plan` will do to each store, ask, and do it while nobody else writes; return whether it was done."""
    with ExitStack() as locks:
        stores = [Store.open(path) for path in paths]
        for path in [] if dry_run else [*paths, *removed]:
            locks.enter_context(exclusive_access(path))
        plans = [plan(store) for store in stores]
        for store, upkeep in zip(stores, plans, strict=True):
            _announce(store, upkeep)
        for path in removed:
            nbytes = sum(map(folder_nbytes, own_entries(path)))
            click.echo(f"{path}: of no cut, view or tower of the settings; all of it goes, {format_bytes(nbytes)}")
        if not removed and not also and not any(upkeep.changes or upkeep.leftovers for upkeep in plans):
            click.echo("nothing to do")
            return False
        if dry_run or not (yes or click.confirm("Do it?")):
            return False
        faults = []
        for store, upkeep in zip(stores, plans, strict=True):
            faults += apply_changes(store, upkeep.changes, _progress(str(store.path), "change"))
        for path in reversed(removed):  # stores of views before the one they lie in
            remove_store(path)
    for fault in faults:
        click.echo(fault)
    if faults:
        sys.exit(1)
    return True


def _announce(store: Store, upkeep: UpkeepPlan) -> None:
    if upkeep.changes:
        click.echo(f"{store.path}: {_becoming(upkeep)}; this frees {_freed(upkeep)}")
    if upkeep.leftovers:
        click.echo(f"{store.path}: {upkeep.leftovers:,} temporary folders of killed writers go")
    for line in upkeep.left:
        click.echo(f"{store.path}: {line}")


def _becoming(upkeep: UpkeepPlan) -> str:
    new = f", {upkeep.new_segments:,} come in their place" if upkeep.new_segments else ""
    return f"{upkeep.segments:,} segments go{new}"


def _freed(upkeep: UpkeepPlan) -> str:
    return f"{upkeep.samples:,} samples and about {format_bytes(upkeep.bytes)}"


def _progress(what: str, unit: str) -> Callable[[Sequence[Item]], Iterable[Item]]:
    return lambda items: tqdm(items, desc=what, unit=unit, disable=None)
