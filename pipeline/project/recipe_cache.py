"""A cache of the recipes that settings and files lead to, so that commands need not build the model to know them.

A recipe is computed on a built model, which takes seconds. It is a function of the settings, the files of weights, the
keys and targets of the data set, the libraries and this package; the digest of all these is cached with the recipes
that a built model had, for an encode with nothing to do. Where one of them is unknown without building (the user's own
function, a download whose file is unknown), nothing is cached.

For each store, the stamps of the files that its weights were read from are cached too: while they are the same, a run
takes the weights of its suffix from the store. The file may be deleted at any time.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Section
from pipeline.data import SampleTable, Stamp
from pipeline.errors import AbsentError, StoreError
from pipeline.files import PACKAGE, is_function, locate, write_whole
from pipeline.keys import JSON, content_key, digest
from pipeline.models import PRETRAINED, ModelConfig
from pipeline.project.settings import SECTIONS, CutName, Project
from pipeline.store import SUFFIX, Store, has_attachment

FILE = "recipes.json"
IRRELEVANT: Mapping[str, frozenset[str]] = {
    "encode": frozenset(
        {
            "store",
            "store_options",
            "batch_size",
            "batch_tokens",
            "segment_samples",
            "workers",
            "executor",
            "device",
            "placement",
            "memory_gb",
            "channels_last",
            "compile",
        }
        | {"replace", "max_bad"}
    ),
    "train": frozenset(SECTIONS["train"].model_fields),
    "data": frozenset(SECTIONS["data"].model_fields),
    "towers": frozenset(SECTIONS["towers"].model_fields),
}
"""Settings that decide no recipe. Those of the data decide keys and targets, which are in the digest; those of a tower
are in the other sections of its project."""
LIBRARIES = ("numpy", "safetensors", "timm", "tokenizers", "torch", "torchvision", "transformers")


def cache_key(project: Project, table: SampleTable) -> str | None:
    """Return the digest of everything that decides the recipes; None where some of it is unknown."""
    try:
        files = _stamps_digest(_files(project))
    except OSError:
        return None
    if files is None or is_function(project.task.kind):
        return None
    settings: dict[str, Section] = {name: getattr(project, name) for name in SECTIONS}
    known: dict[str, JSON] = {
        "settings": {
            name: section.model_dump(mode="json", exclude=set(IRRELEVANT.get(name, ())))
            for name, section in settings.items()
        },
        "files": files,
        "table": _table(table),
        "libraries": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "package": _package(),
    }
    return digest(known)


def complete_stores(project: Project, key: str | None, keys: Sequence[np.ndarray]) -> list[list[Store]] | None:
    """Return the stores, `stores[view][cut]`, if they lack nothing and have the recipes cached under `key`.

    `keys[view]` (n, 16) uint8 are those of the samples wanted in each view.
    """
    recipes = _remembered(project, key)
    found = []
    for view, wanted in zip(project.views, keys, strict=True):
        try:
            of_view = [project.open_store(cut, view) for cut in project.encode.cuts]
            if any(one.recipe.digest != recipes.get(_name(one)) or one.missing(wanted).any() for one in of_view):
                return None
            if view is None and project.encode.suffix and _lacks_suffix(project, of_view):
                return None
        except StoreError:
            return None
        found.append(of_view)
    return found


def remember(project: Project, key: str | None, stores: Sequence[Sequence[Store]]) -> None:
    """Cache the recipes of `stores[view][cut]`, which were just computed on the model."""
    if key is not None:
        recipes = {_name(store): store.recipe.digest for of_view in stores for store in of_view}
        _write(project, _read(project) | {"key": key, "recipes": recipes})


def weights_key(project: Project) -> str | None:
    """Return the digest of the stamps of the files that have the weights; None where they are unknown or too new."""
    try:
        return _stamps_digest(_weight_files(project))
    except (OSError, AbsentError):
        return None


def remember_weights(project: Project, stores: Sequence[Store], key: str | None) -> None:
    """Cache that the weights of the plain `stores` are those of the files whose `weights_key` was `key`."""
    if key is not None and key == weights_key(project):
        known = _read(project)
        found = {_name(store): [store.recipe.digest, key] for store in stores}
        if known.get("weights") != (both := {**known.get("weights", {}), **found}):
            _write(project, known | {"weights": both})


def store_of_known_weights(project: Project, cut: CutName) -> Store | None:
    """Open the store of `cut`; None unless the files of weights are unchanged since its recipe was computed on them."""
    key = weights_key(project)
    known = _read(project).get("weights", {}).get(project.store_path(cut).as_posix())
    if key is None or not isinstance(known, list) or key not in known:
        return None
    try:
        store = project.open_store(cut)
    except StoreError:
        return None
    return store if known == [store.recipe.digest, key] else None


def _lacks_suffix(project: Project, stores: Sequence[Store]) -> bool:
    """Return whether one of the plain `stores` could have a pretrained suffix but has none."""
    return project.model.has_weights_in_files and not all(has_attachment(store, SUFFIX) for store in stores)


def _file(project: Project) -> Path:
    return project.work_dir / (FILE if project.tower is None else f"{project.tower}-{FILE}")


def _name(store: Store) -> str:
    return store.path.as_posix()


def _remembered(project: Project, key: str | None) -> Mapping[str, str]:
    known = _read(project)
    return known.get("recipes", {}) if key is not None and known.get("key") == key else {}


def _read(project: Project) -> dict[str, Any]:
    """Return the contents of the cache; empty where it is missing or damaged."""
    try:
        known = json.loads(_file(project).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(known.get(name, {}), dict) for name in ("recipes", "weights"))
    return known if whole else {}


def _write(project: Project, known: Mapping[str, Any]) -> None:
    write_whole(_file(project), json.dumps(known, indent=2) + "\n")


def _stamps_digest(files: Sequence[Path] | None) -> str | None:
    """Return the digest of the stamps of `files`; None where they are unknown or may change without a new stamp."""
    now = time.time_ns()
    stamps = [Stamp.of(file) for file in files or ()]
    if files is None or not all(stamp.settled(now) for stamp in stamps):
        return None
    return digest([[stamp.path, stamp.size, stamp.mtime_ns, stamp.inode] for stamp in stamps])


def _files(project: Project) -> list[Path] | None:
    """Return every file that the model and its preprocessing are read from; None where they are unknown."""
    model, tokenizer, weights = project.model, project.preprocess.tokenizer, _weight_files(project)
    if model.library == "function" or model.trust_remote_code or weights is None:
        return None
    texts = [] if tokenizer is None else _inside([_folder(tokenizer)])
    return None if texts is None else [*weights, *texts]


def _weight_files(project: Project) -> list[Path] | None:
    """Return every file that the weights are read from, with the configuration beside them; None if unknown."""
    model = project.model
    files = [locate(str(model.weights), "model.weights")] if model.has_file else []
    if model.library == "function":
        return files or None
    folders: list[Path | None] = []
    if model.library == "hf":
        folders = [_folder(model.name)]
    elif model.weights == PRETRAINED:
        folders = [_downloads(model)]
    inside = _inside(folders)
    return None if inside is None else [*files, *inside]


def _inside(folders: Sequence[Path | None]) -> list[Path] | None:
    """Return the files in `folders`; None where a folder is unknown or empty, or names another network's weights."""
    files: list[Path] = []
    for folder in folders:
        inside = [] if folder is None else sorted(_walk(folder)) if folder.is_dir() else [folder]
        if not inside or any(file.name == "adapter_config.json" for file in inside):  # it names another network
            return None
        files += inside
    return files


def _folder(name: str) -> Path | None:
    """The directory or the file that a setting names; None where it names a repository of the hub."""
    if name.startswith(PACKAGE):
        return locate(name, "model.backbone")
    folder = Path(name).expanduser()
    return folder if folder.exists() else None


def _downloads(model: ModelConfig) -> Path | None:
    """Where a library keeps the weights it downloaded; timm's lie in the hub's cache and may be fetched anew."""
    if model.library != "torchvision":
        return None
    from torch.hub import get_dir  # noqa: PLC0415  (slow to import)

    return Path(get_dir()) / "checkpoints"


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def _table(table: SampleTable) -> str:
    targets = {name: values.tolist() for name, values in table.targets.items()}
    return content_key([table.keys, table.split.tolist(), targets]).hex()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _package() -> str:
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    return content_key([[file.relative_to(root).as_posix(), file.read_bytes()] for file in files]).hex()
