"""How small an input a network accepts."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn

Size = TypeVar("Size")


def smallest(
    build: Callable[[Size], nn.Module], sizes: Iterable[Size], shape: Callable[[Size], tuple[int, ...]]
) -> Size:
    """Return the first of `sizes` that a network accepts as `shape(size)` per sample, when built for it.

    It is tried on the meta device, where shapes are computed and nothing else, in training mode, as batch norms and
    auxiliary heads ask for more there.

    Raises:
        ValueError: it accepts none of them; the message is that of the last one.
    """
    for size in sizes:
        try:
            model = without_weights(partial(build, size)).train()
            with torch.device("meta"), torch.no_grad():
                model(torch.empty(2, *shape(size)))
        except Exception as error:
            refusal = error
        else:
            return size
    raise ValueError(f"no input size is accepted; {size}: {refusal}")


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on the meta device; where the building itself needs values of tensors, only the weights are there."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        with init_empty_weights():
            return build().to("meta")
