"""Values on their way to disk: one tensor per name, in the narrowest allowed dtype that keeps their range.

The decision falls per segment and from the segment's values alone, so that writers need not agree on anything and the
bytes stay a pure function of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.store.format import ArraySpec

Values: TypeAlias = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]

# Storage dtype -> what is tried in turn. bf16 has the range of fp32 but for its last half step, which attention masks
# made of the lowest fp32 number reach.
_LADDERS: dict[str, tuple[torch.dtype, ...]] = {
    "raw:float16": (torch.float16, torch.bfloat16, torch.float32),
    "raw:bfloat16": (torch.bfloat16, torch.float32),
    "raw:float32": (torch.float32,),
}
_STORABLE = "floats, signed integers, uint8 and bool"
_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Encoded:
    """A tensor as it goes to disk: `data` in the stored dtype, and for a ragged one `offsets` (n + 1,) int64."""

    spec: ArraySpec
    data: np.ndarray
    offsets: np.ndarray | None = None


def check_storage(storage: str) -> None:
    """Raise StoreError unless `storage` names a codec and dtype that this version writes."""
    if storage not in _LADDERS:
        raise StoreError(f"storage is {storage!r}; this version writes {', '.join(_LADDERS)}; choose one of these")


def storage_dtype(storage: str) -> torch.dtype:
    """Return the dtype that floating-point tensors have unless their range forbids it."""
    check_storage(storage)
    return _LADDERS[storage][0]


def encode(name: str, values: Values, n_samples: int, storage: str) -> Encoded:
    """Return the tensor `name` of `n_samples` samples as it is stored.

    A sequence has one array per sample; where their shapes differ in one axis, this axis is moved first and the samples
    are laid end to end.

    Raises:
        StoreError: the number of samples, the shapes or the dtype do not allow it, or the values leave every range.
    """
    tensor, offsets, axis = _joined(name, values)
    found = len(tensor) if offsets is None else len(offsets) - 1
    if found != n_samples:
        raise StoreError(f"{name} has {found} samples, the unit has {n_samples} keys; give one entry per key")
    narrow = _narrowed(name, tensor.contiguous(), storage)
    dtype = tensor.dtype if narrow.dtype in (torch.int32, torch.int64) else narrow.dtype
    bits = narrow.view(torch.int16) if narrow.dtype == torch.bfloat16 else narrow
    data = bits.numpy()
    data = data.view(np.uint16) if narrow.dtype == torch.bfloat16 else data
    return Encoded(ArraySpec(data.shape, dtype_name(dtype), data.dtype.name, axis), data, offsets)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as it stands in metadata: `float16`."""
    return str(dtype).removeprefix("torch.")


def _narrowed(name: str, tensor: Tensor, storage: str) -> Tensor:
    if tensor.dtype in _INTEGERS:
        return tensor
    if tensor.dtype == torch.int64:
        narrow = tensor.to(torch.int32)
        return narrow if torch.equal(narrow.to(torch.int64), tensor) else tensor
    if not tensor.is_floating_point():
        raise StoreError(f"{name} has dtype {dtype_name(tensor.dtype)}; {_STORABLE} are stored")
    for dtype in _LADDERS[storage]:
        narrow = tensor.to(dtype)
        if _is_in_range(tensor, narrow):
            return narrow
    raise StoreError(f"{name} has finite values up to {tensor.abs().max():g}, beyond the range of float32")


def _is_in_range(wide: Tensor, narrow: Tensor) -> bool:
    """Tell whether every finite value of `wide` is finite in `narrow`."""
    if not narrow.numel():
        return True
    extremes = torch.stack(torch.aminmax(narrow))  # NaN if there is one; four times as fast as looking at each value
    return bool(torch.isfinite(extremes).all()) or not bool((torch.isinf(narrow) & torch.isfinite(wide)).any())


def _joined(name: str, values: Values) -> tuple[Tensor, np.ndarray | None, int | None]:
    """Return all samples in one tensor, and for ragged ones their offsets in it and the axis that was moved first."""
    if isinstance(values, Tensor | np.ndarray):
        tensor = _as_tensor(name, values)
        if not tensor.ndim:
            raise StoreError(f"{name} has no axes; the first one counts samples")
        return tensor, None, None
    samples = [_as_tensor(name, value) for value in values]
    if not samples:
        return torch.empty(0), None, None
    if len({(sample.ndim, sample.dtype) for sample in samples}) > 1:
        raise StoreError(f"{name} has samples of different dtypes or numbers of axes; make them equal")
    lengths = np.array([sample.shape for sample in samples], np.int64).reshape(len(samples), -1)
    ragged = np.flatnonzero((lengths != lengths[0]).any(axis=0))
    if len(ragged) == 0:
        return torch.stack(samples), None, None
    if len(ragged) > 1:
        raise StoreError(f"{name} differs between samples in axes {ragged.tolist()}; one ragged axis can be stored")
    axis = int(ragged[0])
    offsets = np.concatenate([[0], np.cumsum(lengths[:, axis])])
    return torch.cat([sample.movedim(axis, 0) for sample in samples]), offsets, axis


def _as_tensor(name: str, values: Tensor | np.ndarray) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if values.dtype.kind not in "biuf":
        raise StoreError(f"{name} has dtype {values.dtype}; {_STORABLE} are stored")
    # torch wants native byte order and memory it may write to.
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable))
