"""The stores of a project: found by the settings, opened for writing, and marked for DVC where they are remote."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data import SampleTable
from pipeline.errors import ConfigError, StaleStoreError, StoreError
from pipeline.files import write_whole
from pipeline.keys import Recipe, digest
from pipeline.project.settings import Project
from pipeline.store import Remote, Store, find_stores, remove_store

log = logging.getLogger("recycle")

MARKER = "elsewhere.json"
"""File below data/activations that stands for a remote store."""


def open_stores(project: Project, recipes: Sequence[Sequence[Recipe]], *, replace_stores: bool) -> list[list[Store]]:
    """Open the stores of `recipes[view][cut]` for writing, as `stores[view][cut]`; create those that do not exist.

    A store of another recipe is of no use to these settings, but may have taken hours: one with samples is removed only
    if `replace_stores`, and only after all stores were checked.

    Raises:
        StaleStoreError: some stores have another recipe; the message names them and the ways out.
    """
    stale = dict[Path, str]()
    for view, of_view in zip(project.views, recipes, strict=True):
        for cut, recipe in zip(project.encode.cuts, of_view, strict=True):
            path = project.store_path(cut, view)
            try:
                store = project.open_store(cut, view)
            except StoreError:
                continue  # it does not exist, or is broken: then `create` raises
            try:
                store.check_recipe(recipe)
            except StaleStoreError as error:
                if not len(store.keys()) and project.remote is None:
                    remove_store(path)
                else:
                    stale[path] = f"{error.difference} ({store.nbytes() / 1e6:.1f} MB)"
    if stale and (project.remote is not None or not replace_stores):
        raise StaleStoreError(_refusal(project, list(stale.values())))
    for path, change in stale.items():
        log.warning("%s; it is replaced", change)
        remove_store(path)
    return [
        [
            _create(project.store_path(cut, view), recipe, project.remote)
            for cut, recipe in zip(project.encode.cuts, of_view, strict=True)
        ]
        for view, of_view in zip(project.views, recipes, strict=True)
    ]


def _refusal(project: Project, stale: Sequence[str]) -> str:
    if project.remote is not None:
        return "; ".join([*stale, "others may use that store, so it stays: change encode.store"])
    return "\n  ".join(
        [
            "these settings make other states than the stores hold; nothing was changed:",
            *stale,
            "set it back; or replace these stores (recycle encode --replace, encode.replace: true for dvc repro); or "
            "keep them and encode elsewhere (encode.store: file:///FOLDER)",
        ]
    )


def _create(path: Path, recipe: Recipe, remote: Remote | None) -> Store:
    if remote is None:
        (path / MARKER).unlink(missing_ok=True)  # from now on the store itself is here
    return Store.create(path, recipe, remote)


def write_dvc_markers(project: Project, stores: Sequence[Sequence[Store]]) -> None:
    """Write a local marker for each remote store, `stores[view][cut]`, so that DVC sees its changes."""
    if project.remote is None:
        return
    for store in itertools.chain.from_iterable(stores):
        segments = store.segments()
        marker = {"recipe": store.recipe.digest, "segments": len(segments), "digest": digest(segments)}
        path = project.activations / store.path.relative_to(project.remote.mirror) / MARKER
        write_whole(path, json.dumps(marker, indent=2) + "\n")


def open_store(project: Project, place: Path | str, *, named: bool) -> Store:
    """Open the store at a folder or a URL that the user `named`, or in a folder that `stores_of` gave.

    Raises:
        ConfigError: the URL cannot be used.
        StoreError: it cannot be opened.
    """
    if isinstance(place, str):
        remote = project.remote_at(place)
        return Store.open(remote.mirror, remote=remote)
    return Store.open(place, remote=None if named else project.remote)


def local_stores(project: Project, named: Sequence[Path | str], verb: str) -> list[Path]:
    """Return the folders of the local stores to change: the named ones, or those of all cuts, views and towers.

    Raises:
        ConfigError: there is none yet.
        StoreError: one of them is remote.
    """
    remote_stores = [place for place in named if isinstance(place, str)]
    if remote_stores or (project.remote is not None and not named):
        raise StoreError(
            f"{remote_stores[0] if remote_stores else project.encode.store}: recycle store {verb} changes only local "
            "stores; recycle store info and verify also read remote ones"
        )
    return [Path(place) for place in named or stores_of(project)]


def stores_of(project: Project) -> list[Path]:
    """Return the folders of the stores of all cuts, views and towers of params.yaml; of remote stores, their mirrors.

    Raises:
        ConfigError: there is none yet.
    """
    remote = project.remote
    found = [path for path in _named(project) if (remote.find(path) if remote else path in find_stores(path))]
    if not found:
        place = project.encode.store or project.activations
        raise ConfigError(f"{place} holds no store of encode.cuts; encode first, or name a folder")
    return found


def unnamed_stores(project: Project) -> list[Path]:
    """Return the folders of stores of cuts, views and towers that params.yaml does not name."""
    named = _named(project)
    return [path for path in find_stores(project.activations) if path not in named]


def _named(project: Project) -> dict[Path, str | None]:
    """Return the folders of the stores that params.yaml names, with their towers."""
    return {
        part.store_path(cut, view): part.tower
        for part in project.parts
        for cut in part.encode.cuts
        for view in part.views
    }


def wanted_keys(project: Project, store: Path) -> np.ndarray:
    """Return the keys (n, 16) uint8 of the samples that belong in the store; a tower has those of its role."""
    table, tower = SampleTable.read(project.samples), _named(project).get(store)
    return table.keys if tower is None else table.keys[table.targets["role"] == tower]
