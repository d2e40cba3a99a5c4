"""Codecs: how the values of an array are stored. Each is one class, registered in `CODECS`.

    raw             the values
    zstd            the values, compressed
    int8            states as integers -127..127 with fp32 scales beside them: value = integer * scale, where the scale
                    is the largest magnitude / 127 of each row: what follows the first axis of a sample, (n, T, 1) of
                    states (n, T, D), (n, C, 1, 1) of (n, C, H, W); of (n, D) and ragged tensors (E, ...) each entry
    int8-channel    the same with a scale for each channel of the segment: (1, 1, D) of (n, T, D), (1, D) of (n, D),
                    (1, C, 1, 1) of (n, C, H, W)
    int8-group, int4-group
                    states in groups of 64 values, each with a scale and an offset, and its largest value exact

To add one, derive a class from `Codec` and register it; name it in `encode.codec` and in docs/store-format.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numcodecs import blosc

from pipeline.errors import StoreError
from pipeline.store.format.codec import FLOATS, Codec
from pipeline.store.format.groups import Grouped
from pipeline.store.format.names import OFFSETS, SCALES, STATE_PREFIX, corrupt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEVELS = 127
"""Largest integer that int8 stores; -128 has no counterpart."""
CLEVEL = 3
BLOSC_HEADER = 16

# Dtype -> those tried in turn. bf16 has the range of fp32 but for its last half step, which attention masks made of the
# lowest fp32 number reach.
_LADDERS = {name: FLOATS[place:] for place, name in enumerate(FLOATS)}


class Raw(Codec):
    """Values as they are."""

    name = "raw"


class Zstd(Codec):
    """Values compressed by blosc with zstd."""

    name = "zstd"
    is_mappable = False
    max_chunk_bytes = (1 << 31) - (1 << 20)  # the compressor's own limit, less its overhead

    def compressors(self, itemsize: int) -> list[dict[str, Any]]:
        settings = {"typesize": itemsize, "cname": "zstd", "clevel": CLEVEL, "shuffle": "bitshuffle", "blocksize": 0}
        return [{"name": "blosc", "configuration": settings}]

    def compress(self, chunk: np.ndarray) -> np.ndarray:
        packed = blosc.compress(chunk, b"zstd", CLEVEL, blosc.BITSHUFFLE, 0, chunk.itemsize)
        return np.frombuffer(packed, np.uint8)

    def decompress(self, where: Path, packed: np.ndarray, out: np.ndarray) -> None:
        # blosc believes the sizes in the header.
        claimed, size = int.from_bytes(packed[4:8], "little"), int.from_bytes(packed[12:16], "little")
        if len(packed) < BLOSC_HEADER or claimed != out.nbytes or size != len(packed):
            raise corrupt(where, f"says to hold {claimed} bytes in {size}, expected {out.nbytes} in {len(packed)}")
        try:
            blosc.decompress(packed, out)
        except (RuntimeError, ValueError) as error:
            raise corrupt(where, f"cannot be decompressed ({error})") from error


class Int8(Codec):
    """States as 8-bit integers with a scale for each row."""

    name = "int8"
    is_lossless = False
    beside: ClassVar[Mapping[str, str]] = {SCALES: "float32"}

    def covers(self, name: str, narrow: "Tensor") -> bool:
        return name.startswith(STATE_PREFIX) and narrow.is_floating_point()

    def stored_types(self, dtype: str) -> Sequence[str]:
        return ("int8",) if dtype in FLOATS else ()

    def encode(self, tensor: "Tensor", narrow: "Tensor", *, ragged: bool) -> "tuple[Tensor, dict[str, Tensor]]":
        spread, wide = self.reduced_axes(tensor.ndim, ragged=ragged), tensor.float()
        largest = wide.abs().amax(spread, keepdim=True) if spread and wide.numel() else wide.abs()
        scales = largest / LEVELS
        whole = (wide / scales.where(scales > 0, 1)).round_().clamp_(-LEVELS, LEVELS)
        return whole.char(), {SCALES: scales}

    def decode(
        self, stored: "Tensor", beside: "Mapping[str, Tensor]", dtype: "torch.dtype", shape: Sequence[int]
    ) -> "Tensor":
        import torch  # noqa: PLC0415  (slow to import; a command that reads no values needs none)

        scales, bounds = beside[SCALES], torch.finfo(dtype)
        values = stored * scales
        if scales.numel() and scales.max() * (LEVELS + 1) >= bounds.max:  # rounding may exceed the range
            values.clamp_(bounds.min, bounds.max)
        return values.to(dtype)

    def reduced_axes(self, ndim: int, *, ragged: bool) -> list[int]:
        """Return the axes that share a scale."""
        return list(range(2 if ndim > 2 and not ragged else 1, ndim))


class Int8Channel(Int8):
    """States as 8-bit integers with a scale for each channel of the segment."""

    name = "int8-channel"
    is_mergeable = False

    def reduced_axes(self, ndim: int, *, ragged: bool) -> list[int]:
        channel = ndim - 1 if ndim < 4 else 1
        return [axis for axis in range(ndim) if axis != channel or ndim == 1]


_ALL = (Raw(), Zstd(), Int8(), Int8Channel(), Grouped(8), Grouped(4))
CODECS: Mapping[str, Codec] = {codec.name: codec for codec in _ALL}
"""All codecs by name. Metadata names none but the packed ones: the first other codec whose types and compressors match
reads an array, so a new one must differ from all others in these."""
RAW = CODECS["raw"]
BESIDE = (OFFSETS, *dict.fromkeys(suffix for codec in CODECS.values() for suffix in codec.beside))
"""Suffixes of the names of arrays that belong to a tensor."""


def parse_storage(storage: str) -> tuple[Codec, Sequence[str]]:
    """Return the codec of a storage such as "int8:float16", and the dtypes to try for floating-point values."""
    codec, _, dtype = storage.partition(":")
    if codec not in CODECS or dtype not in _LADDERS:
        raise StoreError(
            f"storage is {storage!r}; expected CODEC:DTYPE of {', '.join(CODECS)} and {', '.join(_LADDERS)}; "
            "choose one of these"
        )
    return CODECS[codec], _LADDERS[dtype]
