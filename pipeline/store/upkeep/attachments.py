"""Folders of a store that hold no states: the pretrained suffix, and the probe of the prefix.

    <store>/NAME/NAME.json     a description, and the SHA-256 digest of every other file
    <store>/NAME/...           files of the caller

An attachment is not in the recipe: a store without it is whole. It is replaced as a whole, and only where it changes,
so that nothing that depends on it is made again.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.files import open_to_others, sha256
from pipeline.keys import JSON, parse_json
from pipeline.store.format.metadata import StrictModel, first_fault
from pipeline.store.format.names import MAX_METADATA_BYTES, read_file
from pipeline.store.format.segment_files import LISTING_FILE
from pipeline.store.local.temporary import discard, sync, sync_tree, temporary_folder
from pipeline.store.store import Store

_REMEDY = "remove the folder, and encode where the model is to have it anew"


class _Description(StrictModel):
    about: dict[str, Any]
    files: dict[str, str]


def write_attachment(store: Store, name: str, about: Mapping[str, JSON], fill: Callable[[Path], None]) -> int:
    """Let `fill` write files to a folder, and put it into the store as NAME unless it is there already.

    Returns the bytes that were written, 0 where nothing changed.

    Raises:
        StoreError: the disk or the bucket refuses; the former attachment is as it was, or gone.
    """
    final = store.path / name
    try:
        with temporary_folder(store.path) as temporary:
            draft = temporary / name
            draft.mkdir()
            fill(draft)
            open_to_others(draft)
            files = _digests(draft, name)
            text = json.dumps({"about": about, "files": files}, indent=2, sort_keys=True) + "\n"
            is_there = _description(store, name) == text.encode()
            if is_there and not (store.files.is_local and _wrong(final, name, files)):
                return 0
            (draft / f"{name}.json").write_text(text, encoding="utf-8")
            sync_tree(draft)
            if final.exists():
                discard(final)
            draft.rename(final)
            sync(store.path)
    except OSError as error:
        raise StoreError(f"{final}: cannot be written ({error.strerror or error}); free some space") from error
    store.files.put_folder(final, last=f"{name}.json")
    return sum(file.stat().st_size for file in final.rglob("*") if file.is_file())


def has_attachment(store: Store, name: str) -> bool:
    """Return whether a store has the attachment NAME."""
    return _description(store, name) is not None


def remove_attachment(store: Store, name: str) -> None:
    """Remove the attachment NAME, if there is one; from a bucket it is not removed."""
    if store.files.is_local and (store.path / name).exists():
        discard(store.path / name)


def read_attachment(store: Store, name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of the attachment NAME, on this disk, and its description; None where there is none.

    Raises:
        CorruptStoreError: a file is not the one that was written.
    """
    folder = store.path / name
    where = folder / f"{name}.json"
    store.files.fetch_folder(folder)
    if not folder.exists():
        return None
    try:
        said = _Description.model_validate(parse_json(read_file(where, MAX_METADATA_BYTES).decode("utf-8")))
    except OSError as error:
        raise CorruptStoreError(f"{where}: cannot be read ({error.strerror}); {_REMEDY}") from error
    except ValueError as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else error
        raise CorruptStoreError(f"{where} does not describe an attachment ({fault}); {_REMEDY}") from error
    if wrong := _wrong(folder, name, said.files):
        raise CorruptStoreError(f"{folder / wrong[0]} is not what was written; {_REMEDY}")
    return folder, said.about


def _wrong(folder: Path, name: str, files: Mapping[str, str]) -> list[str]:
    """Return names of files that do not have these digests, or are not among them."""
    try:
        there = _digests(folder, name)
    except OSError as error:
        return [str(error.filename)]
    return sorted(file for file in {*files, *there} if files.get(file) != there.get(file))


def _digests(folder: Path, name: str) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    named = {file.relative_to(folder).as_posix(): file for file in files}
    return {path: sha256(file) for path, file in named.items() if path not in (f"{name}.json", LISTING_FILE)}


def _description(store: Store, name: str) -> bytes | None:
    """Return the text that describes the attachment NAME; None where there is none."""
    try:
        return store.files.read_small(store.path / name / f"{name}.json")
    except OSError:
        return None
