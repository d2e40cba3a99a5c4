"""The types and the memory format in which a network holds its weights and computes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError

HALF = (torch.float16, torch.bfloat16)
M = TypeVar("M", bound=nn.Module)
Result = TypeVar("Result")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model computes in `precision` on `device`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@dataclass(frozen=True)
class ComputeFormat:
    """The device, the types and the memory format in which a network computes."""

    device: torch.device
    weights: torch.dtype
    """Type of the network's weights."""
    precision: str
    """Type that it computes in; below that of the weights under autocast."""
    channels_last: bool = False
    """True if batches of images are in the channels-last memory format."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the products of matrices."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @classmethod
    def of(
        cls, device: torch.device, weights: torch.dtype, precision: str | None, *, channels_last: bool
    ) -> "ComputeFormat":
        """Return the format of weights of this type under `encode.precision`, None for the type of the weights.

        Raises:
            ConfigError: weights of 16 bits cannot compute in `precision`.
        """
        own = str(weights).removeprefix("torch.") if weights in HALF else "float32"
        if weights in HALF and precision not in (None, own):
            raise ConfigError(
                f"encode.precision is {precision}, and the weights are of type {own} (model.dtype), which they compute "
                f"in; remove encode.precision, or set model.dtype to {precision}"
            )
        return cls(device, weights, precision or own, channels_last)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `batch` on the device, in the type of the weights if that has 16 bits, and in the memory format.

        The memory format decides the order of additions in a convolution.
        """
        images = torch.channels_last if self.channels_last else torch.contiguous_format
        moved = {name: item.to(self.device, non_blocking=True) for name, item in batch.items()}
        return {
            name: item.contiguous(memory_format=images) if item.dim() == 4 else item.contiguous()
            for name, item in as_inputs(moved, self.weights).items()
        }

    def run(self, network: Callable[..., Result], batch: Mapping[str, Tensor]) -> Result:
        """Return the output of `network` for `batch`."""
        with autocast("float32" if self.weights in HALF else self.precision, self.device):
            return network(**self.inputs(batch))


def as_inputs(batch: Mapping[str, Tensor], weights: torch.dtype) -> dict[str, Tensor]:
    """Return `batch`, its floating-point tensors in the type of the `weights` if that has 16 bits."""
    return {
        name: item.to(weights) if weights in HALF and item.is_floating_point() else item for name, item in batch.items()
    }


def weights_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating-point type of most values of `tensors`; float32 where there are none."""
    sizes = Counter[torch.dtype]()
    for item in tensors:
        if item.is_floating_point():
            sizes[item.dtype] += item.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def widen(module: M) -> M:
    """Convert parameters and buffers of 16 bits to float32, in place; return `module`."""
    module._apply(lambda item: item.float() if item.dtype in HALF else item)  # type: ignore[no-untyped-call]
    return module
