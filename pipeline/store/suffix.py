"""What a store carries for those who have nothing else: the suffix as it was pretrained.

    <store>/suffix/suffix.json     what it belongs to, and the SHA-256 digest of every other file
    <store>/suffix/...             files of whoever wrote them

It is no part of the states and not in the recipe: a store without it is whole. It is replaced as a whole, and where it
would not change it is left alone, so that nothing that depends on it is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.files import sha256
from pipeline.keys import JSON, parse_json
from pipeline.store.format import MAX_METADATA_BYTES, SUFFIX
from pipeline.store.listing import LISTING_FILE
from pipeline.store.scratch import discard, scratch, sync, sync_tree
from pipeline.store.store import Store
from pipeline.store.untrusted import read_file

ABOUT = "suffix.json"


def write_suffix(store: Store, about: Mapping[str, JSON], fill: Callable[[Path], None]) -> int:
    """Let `fill` write files to a folder, and put it into the store unless it is there as it is.

    Returns the bytes that were written, 0 where nothing changed.

    Raises:
        StoreError: the disk refuses; what was there before is as it was, or gone. Or they cannot be put elsewhere.
    """
    final = store.path / SUFFIX
    try:
        with scratch(store.path) as temporary:
            made = temporary / SUFFIX
            made.mkdir()
            fill(made)
            text = json.dumps({"about": about, "files": _digests(made)}, indent=2, sort_keys=True) + "\n"
            if _said(store) == text and (store.remote is not None or not _wrong(final, json.loads(text)["files"])):
                return 0
            (made / ABOUT).write_text(text, encoding="utf-8")
            sync_tree(made)
            if final.exists():
                discard(final)
            made.rename(final)
            sync(store.path)
    except OSError as error:
        raise StoreError(f"{final}: cannot be written ({error.strerror or error}); free some space") from error
    if store.remote is not None:
        store.remote.put(final, last=ABOUT)
    return sum(file.stat().st_size for file in final.rglob("*") if file.is_file())


def carries_suffix(store: Store) -> bool:
    """Say whether a store carries anything."""
    return _said(store) is not None


def remove_suffix(store: Store) -> None:
    """Remove what a store carries, if anything; it stays where the store lies elsewhere."""
    if store.remote is None and (store.path / SUFFIX).exists():
        discard(store.path / SUFFIX)


def read_suffix(store: Store) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of what a store carries and what its writer said of it; None where it carries nothing.

    Of a store that lies elsewhere it is brought here first.

    Raises:
        CorruptStoreError: a file is not the one that was written.
    """
    folder = store.path / SUFFIX
    if store.remote is not None:
        store.remote.bring(folder)
    if not folder.exists():
        return None
    try:
        said = parse_json(read_file(folder / ABOUT, MAX_METADATA_BYTES).decode("utf-8"))
        about, files = dict(said["about"]), {str(name): str(digest) for name, digest in said["files"].items()}
    except OSError as error:
        raise CorruptStoreError(f"{folder / ABOUT}: cannot be read ({error.strerror}); {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"{folder / ABOUT} does not describe a suffix ({error}); {_REMEDY}") from error
    if wrong := _wrong(folder, files):
        raise CorruptStoreError(f"{folder / wrong[0]} is not what was written; {_REMEDY}")
    return folder, about


_REMEDY = "remove the folder, and encode where the model is to have it anew"


def _wrong(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Names of files that are not of these digests, or that nobody wrote."""
    try:
        there = _digests(folder)
    except OSError as error:
        return [str(error.filename)]
    return sorted(name for name in {*files, *there} if files.get(name) != there.get(name))


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    named = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: sha256(file) for name, file in named.items() if name not in (ABOUT, LISTING_FILE)}


def _said(store: Store) -> str | None:
    """What describes the suffix that a store carries; None where there is none."""
    file = store.path / SUFFIX / ABOUT
    try:
        if store.remote is not None:
            return store.remote.read_small(file).decode("utf-8")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
