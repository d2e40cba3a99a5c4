"""Tensors of samples -> stored arrays, one per name, each in the narrowest allowed dtype that keeps its range.

The dtype is chosen per segment and from the segment's values alone, so that writers need not agree on anything and the
bytes are a pure function of the samples.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.store.format.codecs import RAW, parse_storage
from pipeline.store.format.layout import ArraySpec, EncodedTensor

Values: TypeAlias = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]

_STORABLE = "floats, signed integers, uint8 and bool"
_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def encode(name: str, values: Values, n_samples: int, storage: str) -> EncodedTensor:
    """Return the tensor `name` of `n_samples` samples as it is stored.

    A sequence has one array per sample; where their shapes differ in one axis, this axis is moved first and the samples
    are laid end to end.

    Raises:
        StoreError: the number of samples, the shapes or the dtype do not allow it, or the values exceed every range.
    """
    codec, ladder = parse_storage(storage)
    tensor, offsets, axis = _concatenated(name, values)
    found = len(tensor) if offsets is None else len(offsets) - 1
    if found != n_samples:
        raise StoreError(f"{name} has {found} samples, the unit has {n_samples} keys; give one entry per key")
    narrow = _narrowed(name, tensor.contiguous(), ladder)
    codec = codec if codec.covers(name, narrow) else RAW
    stored, beside = codec.encode(tensor, narrow, ragged=offsets is not None)
    stored = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
    dtype = _dtype_name(tensor.dtype if narrow.dtype in (torch.int32, torch.int64) else narrow.dtype)
    packed = tuple(tensor.shape[1:]) if codec.is_packed else None
    spec = ArraySpec(tuple(stored.shape), dtype, _dtype_name(stored.dtype), axis, codec, packed)
    if spec.chunk_nbytes > codec.max_chunk_bytes:
        raise StoreError(
            f"{name} has {spec.chunk_nbytes} bytes a sample; {codec.name} compresses at most {codec.max_chunk_bytes}; "
            "set codec: raw"
        )
    return EncodedTensor(spec, stored.numpy(), offsets, {suffix: array.numpy() for suffix, array in beside.items()})


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as metadata has it: `float16`."""
    return str(dtype).removeprefix("torch.")


def _narrowed(name: str, tensor: Tensor, ladder: Sequence[str]) -> Tensor:
    if tensor.dtype in _INTEGERS:
        return tensor
    if tensor.dtype == torch.int64:
        narrow = tensor.to(torch.int32)
        return narrow if torch.equal(narrow.to(torch.int64), tensor) else tensor
    if not tensor.is_floating_point():
        raise StoreError(f"{name} has dtype {_dtype_name(tensor.dtype)}; {_STORABLE} are stored")
    for dtype in ladder:
        narrow = tensor.to(getattr(torch, dtype))
        if _keeps_range(tensor, narrow):
            return narrow
    raise StoreError(f"{name} has finite values up to {tensor.abs().max():g}, beyond the range of float32")


def _keeps_range(wide: Tensor, narrow: Tensor) -> bool:
    """Return whether every finite value of `wide` is finite in `narrow`."""
    if not narrow.numel():
        return True
    extremes = torch.stack(torch.aminmax(narrow))  # NaN if there is one; four times as fast as looking at each value
    return bool(torch.isfinite(extremes).all()) or not bool((torch.isinf(narrow) & torch.isfinite(wide)).any())


def _concatenated(name: str, values: Values) -> tuple[Tensor, np.ndarray | None, int | None]:
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
