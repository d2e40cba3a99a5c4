"""The minimum size of a training batch, which batch norms and losses determine."""

from collections.abc import MutableMapping, Sequence

import numpy as np
import torch
from torch import nn

from pipeline.data import SampleTable
from pipeline.errors import TrainError
from pipeline.project.towers import Tower
from pipeline.train import processes
from pipeline.train.objective import trains_on_one


def minimum_units(
    towers: Sequence[Tower],
    suffix: nn.Module,
    table: SampleTable,
    device: torch.device,
    known: MutableMapping[nn.Module, bool],
) -> int:
    """Return the minimum number of units in every training batch of `suffix`, the trained model; 1 if any number works.

    A batch norm needs two values of each channel in every process that computes its own statistics; a loss that
    compares units needs two of them. `known` has the suffixes that were tried on a single sample, and gets this one.

    Raises:
        TrainError: a batch, or the training split, has fewer units.
    """
    config, task = towers[0].loaded.project.train, towers[0].loaded.task
    units = task.units(table, "train", seed=config.seed, epoch=0)
    if not len(units):
        raise TrainError("the training split is empty; lower data.validation, or give samples the split train")
    size, count, apart = config.batch_size, len(units), processes.world() if device.type == "cpu" else 1
    per_unit = 1 if len(towers) > 1 else _smallest(units)
    for_norms = -(-2 * apart // per_unit)
    if min(count % size or size, count) >= for_norms or _trains_on_one(towers, suffix, known):
        return task.minimum_units
    if size < for_norms:
        raise TrainError(f"train.batch_size is {size}; {_why(for_norms, apart)}")
    if count < for_norms:
        raise TrainError(f"the training split has {count} units; {_why(for_norms, apart)}")
    return max(task.minimum_units, for_norms)


def _smallest(units: Sequence[np.ndarray] | np.ndarray) -> int:
    """Return the number of rows of the smallest unit."""
    return min(map(len, units)) if isinstance(units, list) else units[0].size


def _why(least: int, apart: int) -> str:
    each = "" if apart == 1 else f", 2 samples for each of {apart} processes"
    return (
        f"a batch norm after the cut has one value per sample to take statistics of, and needs {least} units in a step"
        f"{each}; give it as many, cut above that layer, or set train.adapter, which keeps the pretrained statistics"
    )


def _trains_on_one(towers: Sequence[Tower], suffix: nn.Module, known: MutableMapping[nn.Module, bool]) -> bool:
    if suffix in known:
        return known[suffix]
    suffix.train()
    parts = [suffix] if len(towers) == 1 else [suffix.get_submodule(str(tower.name)) for tower in towers]
    firsts = [tower.loaded.stored_batch(tower.store, np.array([0])) for tower in towers]
    known[suffix] = all(trains_on_one(part, first) for part, first in zip(parts, firsts, strict=True))
    return known[suffix]
