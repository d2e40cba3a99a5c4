"""Encoders opened for training and prediction, and several of them (towers) trained as one model.

A tower is the encoder of one role, with its own samples, store and model. A training batch is rows of the sample table;
each tower reads those in its role from its own store, and the embeddings are concatenated tower by tower, as are the
targets.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.data import SampleTable
from pipeline.errors import AbsentError, ConfigError, DataError, TrainError
from pipeline.project.model import LoadedModel
from pipeline.project.settings import CutName, Project
from pipeline.project.views import Views
from pipeline.split import Prefix, State, Suffix
from pipeline.tasks import read_tensor
from pipeline.train.adapter import merged
from pipeline.train.loader import Batch, Loader

log = logging.getLogger("recycle")


@dataclass(frozen=True)
class Tower:
    """An encoder with its samples: the only one of a project, or that of one role."""

    loaded: LoadedModel
    table: SampleTable
    """Its own samples, n."""
    rows: np.ndarray
    """Their rows in the sample table of the project, (n,) int64, ascending."""
    store: Views
    before: Prefix | None
    """The layers before the cut; None where only the suffix has weights."""
    suffix: Suffix
    """With the weights of the model, on the CPU."""

    @property
    def prefix(self) -> Prefix:
        """The layers before the cut; raises AbsentError where only the suffix has weights."""
        if self.before is None:
            raise AbsentError(f"{self.loaded.backbone.name} was opened without the layers before the cut")
        return self.before

    @property
    def name(self) -> str | None:
        """The role of its samples; None of the only encoder."""
        return self.loaded.project.tower


def open_tower(
    project: Project,
    cut: CutName,
    table: SampleTable,
    *,
    suffix_only: bool = False,
    sample: np.ndarray | None = None,
) -> Tower:
    """Open one encoder (`project` is one of `Project.parts`) for runs of `cut`, with the rows of `table` in its role.

    Neither raw data nor another recipe's store is read. With `suffix_only`, only the suffix has weights where the
    pretrained suffix in the store has them, and the others are not read. With `sample` (n,) int64, ascending, the tower
    has these rows alone, numbered as in `table.of(sample)`; `table` still decides the head.

    Raises:
        AbsentError: the weights are not on this machine.
        ConfigError: its cut was never encoded.
        DataError: the samples have no roles.
        StaleStoreError: its store was encoded under another recipe; the message names the first field that differs.
    """
    rows = np.arange(len(table))
    if project.tower is not None:
        if "role" not in table.targets:
            raise DataError(f"the samples have {', '.join(table.targets)}; towers need roles: those of pairs")
        rows = np.flatnonzero(table.targets["role"] == project.tower)
        table = table.of(rows)
    loaded = LoadedModel.open(project, table, suffix_of=project.at(cut) if suffix_only else None)
    if sample is not None:
        kept = np.isin(rows, sample)
        table, rows = table.of(np.flatnonzero(kept)), np.searchsorted(sample, rows[kept])
    views, prefix, suffix = loaded.open_store(project.at(cut), table)
    if suffix_only and views.plain.is_linked:
        log.warning(
            "%s: its files are links to a cache; DVC copies the whole store before each encode then: dvc config "
            "cache.type reflink,copy (docs/sharing.md)",
            views.path,
        )
    return Tower(loaded, table, rows, views, prefix, suffix)


def trainable_suffix(tower: Tower) -> Suffix:
    """Return the suffix to train, with adapters if `train.adapter` is set, or a frozen suffix.

    Raises:
        ConfigError: it does not train, and its head has no weights of the pretrained network.
    """
    if tower.loaded.project.towers.of(tower.name).trains:
        return tower.loaded.trainable(tower.store, tower.suffix)
    if untrained := sorted(tower.loaded.backbone.fresh & dict(tower.suffix.named_parameters()).keys()):
        raise ConfigError(
            f"towers.{tower.name}.trains is false, but {untrained[0]} was not pretrained and would stay as it was "
            f"drawn; set towers.{tower.name}.layers: [], or let it train"
        )
    return tower.suffix.requires_grad_(False)


def trainable_model(towers: Sequence[Tower]) -> nn.Module:
    """Return the model to train: the only suffix, or those of all towers."""
    first, *others = towers
    if not others:
        return trainable_suffix(first)
    config = first.loaded.project.towers
    suffixes = {str(first.name): trainable_suffix(first)}
    for other in others:
        suffixes[str(other.name)] = suffixes[str(first.name)] if config.shared else trainable_suffix(other)
    return Towers(suffixes)


def plain_model(towers: Sequence[Tower]) -> nn.Module:
    """Return the model of plain suffixes, without adapters: the only one, or those of all towers."""
    first, *others = towers
    return Towers({str(tower.name): tower.suffix for tower in towers}) if others else first.suffix


class Towers(nn.ModuleDict):
    """Suffixes by role; one without trainable parameters stays in eval mode."""

    def forward(self, state: State, **inputs: Tensor) -> Tensor:
        """Return the embeddings (B, D) of a batch, tower by tower; the tensors of a tower are named TOWER.NAME.

        Raises:
            TrainError: the towers' embeddings differ in size.
        """
        found = [read_tensor(tower(_of(name, state), **_of(name, inputs))) for name, tower in self.items()]
        if len({embeddings.shape[1:] for embeddings in found}) > 1:
            sizes = ", ".join(f"{name} {list(one.shape[1:])}" for name, one in zip(self, found, strict=True))
            raise TrainError(
                f"the embeddings of the towers differ in size ({sizes}); end towers.<role>.layers in one width"
            )
        return torch.cat(found)

    def train(self, mode: bool = True) -> Self:
        """Set training mode."""
        super().train(mode)
        for tower in self.values():
            tower.train(mode and any(item.requires_grad for item in tower.parameters()))
        return self


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a trained model, with adapters merged into them."""
    if isinstance(model, Suffix):
        return merged(model)
    children = model._modules.items()  # `named_children` leaves out the second tower where both are one suffix
    return {f"{name}.{own}": tensor for name, of in children if of for own, tensor in plain_weights(of).items()}


def load_weights(tower: Tower, file: Path) -> None:
    """Load the weights of a finished run from `file` into the suffix.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        RuntimeError: its weights do not fit.
    """
    kept = load_file(file)
    tower.suffix.load_state_dict(kept if tower.name is None else _of(tower.name, kept))


def new_parameters(towers: Sequence[Tower]) -> frozenset[str]:
    """Return the names, in the trained model, of the parameters that were not pretrained."""
    own = ((tower.name, name) for tower in towers for name in tower.loaded.backbone.fresh)
    return frozenset(name if tower is None else f"{tower}.{name}" for tower, name in own)


class TowerLoader:
    """Batches of several towers: each tower's loader gives its own rows of a batch."""

    def __init__(self, loaders: Mapping[str, Loader], rows: Mapping[str, np.ndarray]) -> None:
        """Combine `loaders` of equal length; `rows` (n,) int64 are the rows of each in the whole table."""
        self._loaders = loaders
        self._rows = {name: torch.from_numpy(own) for name, own in rows.items()}

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        """Choose the epoch of the next iteration, and its batches from `start` to before `end`."""
        for loader in self._loaders.values():
            loader.set_epoch(epoch, start, end)

    def __len__(self) -> int:
        """Return the number of batches that the next iteration gives."""
        return len(next(iter(self._loaders.values())))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch on the device; rows are those of the whole table."""
        for batches in zip(*self._loaders.values(), strict=True):
            of = dict(zip(self._loaders, batches, strict=True))
            yield Batch(
                state={f"{name}.{own}": tensor for name, batch in of.items() for own, tensor in batch.state.items()},
                inputs={f"{name}.{own}": tensor for name, batch in of.items() for own, tensor in batch.inputs.items()},
                targets={name: torch.cat([batch.targets[name] for batch in batches]) for name in batches[0].targets},
                rows=torch.cat([self._rows[name][batch.rows] for name, batch in of.items()]),
                places=_joined_places([batch.places for batch in batches]),
            )


def _joined_places(by_tower: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return the indices of each process's samples in a whole batch, concatenated tower by tower."""
    counts = [int(np.concatenate(places).max()) + 1 for places in by_tower]
    begins = np.cumsum([0, *counts[:-1]])
    return [
        np.concatenate([own + begin for own, begin in zip(of, begins, strict=True)])
        for of in zip(*by_tower, strict=True)
    ]


def _of(name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {own.removeprefix(f"{name}."): tensor for own, tensor in tensors.items() if own.startswith(f"{name}.")}
