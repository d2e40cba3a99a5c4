"""Folders of a store that hold no states: the suffix as it was pretrained, and the probe of the prefix.

    <store>/NAME/NAME.json     what it belongs to, and the SHA-256 digest of every other file
    <store>/NAME/...           files of whoever wrote them

An attachment is not in the recipe: a store without it is whole. It is replaced as a whole, and where it would not
change it is left alone, so that nothing that depends on it is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.files import sha256
from pipeline.keys import JSON, parse_json
from pipeline.store.format import MAX_METADATA_BYTES
from pipeline.store.listing import LISTING_FILE
from pipeline.store.scratch import discard, scratch, sync, sync_tree
from pipeline.store.store import Store
from pipeline.store.untrusted import read_file


def write_attachment(store: Store, name: str, about: Mapping[str, JSON], fill: Callable[[Path], None]) -> int:
    """Let `fill` write files to a folder, and put it into the store as NAME unless it is there as it is.

    Returns the bytes that were written, 0 where nothing changed.

    Raises:
        StoreError: the disk refuses; what was there before is as it was, or gone. Or they cannot be put elsewhere.
    """
    final = store.path / name
    try:
        with scratch(store.path) as temporary:
            made = temporary / name
            made.mkdir()
            fill(made)
            text = json.dumps({"about": about, "files": _digests(made, name)}, indent=2, sort_keys=True) + "\n"
            if _said(store, name) == text and (
                store.remote is not None or not _wrong(final, name, json.loads(text)["files"])
            ):
                return 0
            (made / _about(name)).write_text(text, encoding="utf-8")
            sync_tree(made)
            if final.exists():
                discard(final)
            made.rename(final)
            sync(store.path)
    except OSError as error:
        raise StoreError(f"{final}: cannot be written ({error.strerror or error}); free some space") from error
    if store.remote is not None:
        store.remote.put(final, last=_about(name))
    return sum(file.stat().st_size for file in final.rglob("*") if file.is_file())


def has_attachment(store: Store, name: str) -> bool:
    """Say whether a store has the attachment NAME."""
    return _said(store, name) is not None


def remove_attachment(store: Store, name: str) -> None:
    """Remove the attachment NAME, if there is one; it stays where the store lies elsewhere."""
    if store.remote is None and (store.path / name).exists():
        discard(store.path / name)


def read_attachment(store: Store, name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of the attachment NAME and what its writer said of it; None where there is none.

    Of a store that lies elsewhere it is brought here first.

    Raises:
        CorruptStoreError: a file is not the one that was written.
    """
    folder = store.path / name
    if store.remote is not None:
        store.remote.bring(folder)
    if not folder.exists():
        return None
    try:
        said = parse_json(read_file(folder / _about(name), MAX_METADATA_BYTES).decode("utf-8"))
        about, files = dict(said["about"]), {str(name): str(digest) for name, digest in said["files"].items()}
    except OSError as error:
        raise CorruptStoreError(f"{folder / _about(name)}: cannot be read ({error.strerror}); {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(
            f"{folder / _about(name)} does not describe an attachment ({error}); {_REMEDY}"
        ) from error
    if wrong := _wrong(folder, name, files):
        raise CorruptStoreError(f"{folder / wrong[0]} is not what was written; {_REMEDY}")
    return folder, about


_REMEDY = "remove the folder, and encode where the model is to have it anew"


def _about(name: str) -> str:
    return f"{name}.json"


def _wrong(folder: Path, name: str, files: Mapping[str, str]) -> list[str]:
    """Names of files that are not of these digests, or that nobody wrote."""
    try:
        there = _digests(folder, name)
    except OSError as error:
        return [str(error.filename)]
    return sorted(file for file in {*files, *there} if files.get(file) != there.get(file))


def _digests(folder: Path, name: str) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    named = {file.relative_to(folder).as_posix(): file for file in files}
    return {path: sha256(file) for path, file in named.items() if path not in (_about(name), LISTING_FILE)}


def _said(store: Store, name: str) -> str | None:
    """What describes the attachment NAME; None where there is none."""
    file = store.path / name / _about(name)
    try:
        if store.remote is not None:
            return store.remote.read_small(file).decode("utf-8")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
