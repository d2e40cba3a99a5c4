"""Values on their way to disk: one tensor per name, in the narrowest allowed dtype that keeps their range.

The decision falls per segment and from the segment's values alone, so that writers need not agree on anything and the
bytes stay a pure function of the samples.

A storage is named `codec:dtype`. Codec `raw` stores values as they are, `zstd` compresses them without loss, `int8`
and `int8-channel` store states as whole numbers -127..127 with fp32 scales beside them: value = number * scale, where
the scale is the largest magnitude / 127 of

    int8            each row: what follows the first axis of a sample, (n, T, 1) of states (n, T, D), one per token,
                    (n, C, 1, 1) of (n, C, H, W); of (n, D) and of ragged tensors (E, ...) each entry of the first axis
    int8-channel    each channel of the segment: (1, 1, D) of (n, T, D), (1, D) of (n, D), (1, C, 1, 1) of (n, C, H, W)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.store.format import MAX_CHUNK_BYTES, STATE_PREFIX, ArraySpec

Values: TypeAlias = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]

CODECS = ("raw", "zstd", "int8", "int8-channel")
LEVELS = 127
"""Largest whole number that int8 stores; -128 has no counterpart."""

# Dtype -> what is tried in turn. bf16 has the range of fp32 but for its last half step, which attention masks
# made of the lowest fp32 number reach.
_LADDERS: dict[str, tuple[torch.dtype, ...]] = {
    "float16": (torch.float16, torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float32": (torch.float32,),
}
_STORABLE = "floats, signed integers, uint8 and bool"
_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Encoded:
    """A tensor as it goes to disk.

    Attributes:
        data: in the stored dtype.
        offsets: (n + 1,) int64 for a ragged tensor.
        scales: fp32, broadcastable against `data`, for one in int8.
    """

    spec: ArraySpec
    data: np.ndarray
    offsets: np.ndarray | None = None
    scales: np.ndarray | None = None


def check_storage(storage: str) -> None:
    """Raise StoreError unless `storage` names a codec and dtype that this version writes."""
    codec, _, dtype = storage.partition(":")
    if codec not in CODECS or dtype not in _LADDERS:
        raise StoreError(
            f"storage is {storage!r}; expected CODEC:DTYPE of {', '.join(CODECS)} and {', '.join(_LADDERS)}; "
            "choose one of these"
        )


def storage_dtype(storage: str) -> torch.dtype:
    """Return the dtype that floating-point tensors have unless their range forbids it."""
    check_storage(storage)
    return _LADDERS[storage.partition(":")[2]][0]


def encode(name: str, values: Values, n_samples: int, storage: str) -> Encoded:
    """Return the tensor `name` of `n_samples` samples as it is stored.

    A sequence has one array per sample; where their shapes differ in one axis, this axis is moved first and the samples
    are laid end to end.

    Raises:
        StoreError: the number of samples, the shapes or the dtype do not allow it, or the values leave every range.
    """
    codec, _, dtype = storage.partition(":")
    tensor, offsets, axis = _joined(name, values)
    found = len(tensor) if offsets is None else len(offsets) - 1
    if found != n_samples:
        raise StoreError(f"{name} has {found} samples, the unit has {n_samples} keys; give one entry per key")
    narrow = _narrowed(name, tensor.contiguous(), _LADDERS[dtype])
    scales = None
    if codec.startswith("int8") and name.startswith(STATE_PREFIX) and narrow.is_floating_point():
        stored, scales = quantise(tensor, per_channel=codec == "int8-channel", ragged=offsets is not None)
    else:
        stored = narrow.view(torch.uint16) if narrow.dtype == torch.bfloat16 else narrow
    meant = dtype_name(tensor.dtype if narrow.dtype in (torch.int32, torch.int64) else narrow.dtype)
    spec = ArraySpec(tuple(stored.shape), meant, dtype_name(stored.dtype), axis, "zstd" if codec == "zstd" else "raw")
    if spec.layout == "zstd" and spec.chunk_nbytes > MAX_CHUNK_BYTES:
        raise StoreError(
            f"{name} has {spec.chunk_nbytes} bytes a sample; zstd compresses at most {MAX_CHUNK_BYTES}; set codec: raw"
        )
    return Encoded(spec, stored.numpy(), offsets, None if scales is None else scales.numpy())


def quantise(tensor: Tensor, *, per_channel: bool, ragged: bool) -> tuple[Tensor, Tensor]:
    """Return `tensor` as int8 in -127..127, and the fp32 scales by which these are multiplied, broadcastable to it."""
    axes = range(tensor.ndim)
    if per_channel:
        channel = tensor.ndim - 1 if tensor.ndim < 4 else 1
        spread = [axis for axis in axes if axis != channel or tensor.ndim == 1]
    else:
        spread = [axis for axis in axes if axis > (1 if tensor.ndim > 2 and not ragged else 0)]
    wide = tensor.float()
    largest = wide.abs().amax(spread, keepdim=True) if spread and wide.numel() else wide.abs()
    scales = largest / LEVELS
    whole = (wide / torch.where(scales > 0, scales, 1)).round_().clamp_(-LEVELS, LEVELS)
    return whole.to(torch.int8), scales


def dequantise(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `stored` (int8) times `scales` in `dtype`; what rounding takes beyond its range stays finite."""
    values = stored * scales
    bounds = torch.finfo(dtype)
    if scales.numel() and scales.max() * (LEVELS + 1) >= bounds.max:
        values.clamp_(bounds.min, bounds.max)
    return values.to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as it stands in metadata: `float16`."""
    return str(dtype).removeprefix("torch.")


def _narrowed(name: str, tensor: Tensor, ladder: Sequence[torch.dtype]) -> Tensor:
    if tensor.dtype in _INTEGERS:
        return tensor
    if tensor.dtype == torch.int64:
        narrow = tensor.to(torch.int32)
        return narrow if torch.equal(narrow.to(torch.int64), tensor) else tensor
    if not tensor.is_floating_point():
        raise StoreError(f"{name} has dtype {dtype_name(tensor.dtype)}; {_STORABLE} are stored")
    for dtype in ladder:
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
