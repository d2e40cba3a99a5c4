"""The stores of a project in a training loop of the user's own: encoded by `dvc repro`, trained in a notebook."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data import SPLITS, SampleTable
from pipeline.errors import ConfigError
from pipeline.library.fields import Column
from pipeline.library.store import StateStore
from pipeline.library.table import ItemTable
from pipeline.project import Project
from pipeline.project.towers import Tower, open_tower
from pipeline.split import Suffix
from pipeline.tasks import Prepared, Ragged


class OpenProject(NamedTuple):
    """What a project has of one cut."""

    stores: dict[str, StateStore]
    """By split; a store's items have the targets that the task makes of the labels, such as `label`."""
    suffix: Suffix
    """With the pretrained weights, on the CPU."""
    labels: tuple[str, ...]
    """The classes in the order of the logits; empty of tasks without any."""


def open_project(
    params: Path | str = "params.yaml", cut: float | int | str | None = None, tower: str | None = None
) -> OpenProject:
    """Open the stores of a project, with the layers after the cut; neither raw data nor another recipe's store is read.

    Of augmented views, the first one is read.

    Args:
        params: params.yaml in the current folder, from which its paths are taken.
        cut: one of `encode.cuts`; needed where there are several.
        tower: the role whose encoder is meant, of a project that has one for each.

    Raises:
        ConfigError: `params` is wrong, or in another folder, or the cut is none of its cuts, or was never encoded.
        StaleStoreError: the store was encoded under another recipe; the message names the first field that differs.
    """
    where = Path(params)
    if where.resolve().parent != Path.cwd().resolve():
        raise ConfigError(f"params is {str(params)!r}, whose paths start from its folder; change there (os.chdir)")
    project = Project.load(where)
    cuts = project.encode.cuts
    if cut is None and len(cuts) > 1:
        raise ConfigError(f"cut is not given, and encode.cuts has {', '.join(map(str, cuts))}; name one of these")
    chosen = project.cut(str(cuts[0] if cut is None else cut))
    opened = open_tower(project.part(tower), chosen, SampleTable.read(project.samples), suffix_only=True)
    targets = opened.loaded.task.prepare(opened.table)
    stored = opened.loaded.stored_batch(opened.store, np.array([0]))
    suffix = opened.suffix
    suffix.plan.inputs = dataclasses.replace(suffix.plan.inputs, declared=tuple(stored.inputs))
    stores = {split: _of_split(opened, split, targets) for split in SPLITS if len(opened.table.rows(split))}
    return OpenProject(stores, suffix, tuple(opened.loaded.head.labels or ()))


def _of_split(opened: Tower, split: str, targets: Mapping[str, Prepared]) -> StateStore:
    rows, views = opened.table.rows(split), opened.store
    columns = {name: _column(values, rows) for name, values in targets.items()}
    pad = opened.loaded.backbone.preprocess.pad
    table = ItemTable(opened.table.keys[rows], opened.rows[rows], columns, fills=pad)
    reader = partial(opened.loaded.project.reader, views.path)
    return StateStore(views.path, table, views.first_places(rows), reader, opened.suffix.plan.inputs)


def _column(values: Prepared, rows: np.ndarray) -> Column:
    if not isinstance(values, Ragged):
        return Column(torch.from_numpy(values[rows]))
    lists = [torch.from_numpy(values.values[values.offsets[row] : values.offsets[row + 1]]) for row in rows.tolist()]
    return Column.of(lists)
