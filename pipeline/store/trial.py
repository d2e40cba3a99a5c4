"""Values taken through a codec and back, without a file: what it costs, and what it changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numcodecs import blosc
from torch import Tensor

from pipeline.store.codecs import Encoded, encode
from pipeline.store.format import CLEVEL
from pipeline.store.segment import StoredTensor, typed


def through(name: str, samples: Sequence[Tensor], storage: str) -> tuple[list[Tensor], int]:
    """Return what a segment of these samples of the tensor `name` would give back, and its bytes under `storage`.

    Raises:
        StoreError: their shapes, dtypes or range cannot be stored.
    """
    encoded = encode(name, samples, len(samples), storage)
    tensor = StoredTensor(
        typed(torch.from_numpy(encoded.data), encoded.spec),
        encoded.spec.torch_dtype,
        encoded.offsets,
        encoded.spec.axis or 0,
        None if encoded.scales is None else torch.from_numpy(encoded.scales),
        np.zeros(len(samples), np.uint32),
    )
    return [tensor.sample(row) for row in range(len(samples))], _nbytes(encoded)


def _nbytes(encoded: Encoded) -> int:
    beside = sum(array.nbytes for array in (encoded.offsets, encoded.scales) if array is not None)
    if encoded.spec.layout == "raw" or not encoded.spec.nbytes:
        return encoded.spec.nbytes + beside
    rows = encoded.spec.chunk_shape[0]
    chunks = (encoded.data[begin : begin + rows] for begin in range(0, len(encoded.data), rows))
    size = encoded.data.itemsize
    return beside + sum(len(blosc.compress(chunk, b"zstd", CLEVEL, blosc.BITSHUFFLE, 0, size)) for chunk in chunks)
