"""Inputs to split a network on, from its store: ids and masks as stored, other values drawn in the stored shapes."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError
from pipeline.store import SHAPE_PREFIX
from pipeline.train.loader import Batch

MAX_VALUES = 1 << 28
"""Maximum number of values drawn for one input of a sample."""


def inputs_of(batch: Batch, store: Path) -> dict[str, Tensor]:
    """Return inputs (B, ...) of the shapes that a `batch` of `store` had; floating-point values are drawn.

    Raises:
        CorruptStoreError: a shape is larger than that of any sample can be.
    """
    for name, tensor in batch.inputs.items():
        if tensor.numel() > MAX_VALUES * len(tensor):
            raise CorruptStoreError(
                f"{store}: {SHAPE_PREFIX}{name} says {list(tensor.shape[1:])}, at most {MAX_VALUES} values are made; "
                "encode again"
            )
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for name, tensor in batch.inputs.items()
    }
