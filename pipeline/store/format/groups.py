"""States in groups of 64 values: integers of 8 or 4 bits with a scale and an offset, and the largest value as it is.

A few values of a language model's states are hundreds of times as large as all others ("Massive Activations in Large
Language Models", arXiv:2402.17762). With one scale for a row they leave nothing of the rest. Here each group keeps the
value that is farthest from its median; the others are turned by a random-sign Hadamard matrix, as in QuaRot
(arXiv:2404.00456), which spreads what is still uneven over the group, and rounded.

benchmarks/rounding.py compares this layout with others on several networks.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.store.format.codec import FLOATS, Codec
from pipeline.store.format.names import STATE_PREFIX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = 64
SIGNS = 0x243F6A8885A308D3
"""Bit i is set where value i of a group changes its sign: the first 64 binary digits of pi after the point."""
HEADER = 7
"""Bytes of a group before its integers: scale, offset and largest value in bfloat16, and the place of that value."""
LARGEST = 1e30
"""Magnitude up to which sums over a group stay in the range of float32."""


class Grouped(Codec):
    """States as integers of 8 or 4 bits in groups of `GROUP` values, consecutive in an entry.

    A stored entry is a row of bytes, its groups one after the other, the last one filled up with zeros. Four-bit
    integers lie two to a byte, those of the first half of the group in the lower bits.
    """

    is_lossless = False
    is_packed = True

    def __init__(self, bits: int) -> None:
        self.name = f"int{bits}-group"  # type: ignore[misc]  # of the class elsewhere
        self.bits = bits
        self._middle = (2**bits - 1) / 2
        self._record = HEADER + GROUP * bits // 8

    def covers(self, name: str, narrow: "Tensor") -> bool:
        if not name.startswith(STATE_PREFIX) or not narrow.is_floating_point():
            return False
        return not narrow.numel() or bool(narrow.abs().amax() < LARGEST)  # False for NaN

    def stored_types(self, dtype: str) -> Sequence[str]:
        return ("uint8",) if dtype in FLOATS else ()

    def entry_bytes(self, shape: Sequence[int]) -> int:
        return -(-math.prod(shape) // GROUP) * self._record

    def encode(self, tensor: "Tensor", narrow: "Tensor", *, ragged: bool) -> "tuple[Tensor, dict[str, Tensor]]":
        import torch  # noqa: PLC0415  (slow to import; a command that reads no values needs none)

        shape = tensor.shape[1:]
        flat_EN = tensor.float().reshape(len(tensor), math.prod(shape))
        groups = torch.nn.functional.pad(flat_EN, (0, -flat_EN.shape[1] % GROUP)).view(len(tensor), -1, GROUP)
        if not groups.numel():
            return torch.empty(len(tensor), self.entry_bytes(shape), dtype=torch.uint8), {}
        median = groups.median(-1, keepdim=True).values
        place = (groups - median).abs().argmax(-1, keepdim=True)
        largest = groups.gather(-1, place).bfloat16()
        turned = groups.scatter(-1, place, median) @ _matrix().mul(GROUP**-0.5).T
        low, high = turned.aminmax(dim=-1, keepdim=True)
        offset = ((low + high) / 2).bfloat16()
        scale = ((turned - offset.float()).abs().amax(-1, keepdim=True) / self._middle).bfloat16()
        steps = (turned - offset.float()) / scale.float().where(scale > 0, 1)
        whole = (steps + self._middle).round_().clamp_(0, 2 * self._middle).byte()
        if self.bits == 4:
            whole = whole[..., : GROUP // 2] | whole[..., GROUP // 2 :] << 4
        floats = torch.cat([scale, offset, largest], -1).view(torch.uint8)
        return torch.cat([floats, place.byte(), whole], -1).view(len(tensor), -1), {}

    def decode(
        self, stored: "Tensor", beside: "Mapping[str, Tensor]", dtype: "torch.dtype", shape: Sequence[int]
    ) -> "Tensor":
        import torch  # noqa: PLC0415  (slow to import; a command that reads no values needs none)

        size = math.prod(shape)
        if not len(stored) or not size:
            return torch.empty(len(stored), *shape, dtype=dtype)
        records = stored.view(len(stored), -1, self._record)
        floats = records[..., :6].flatten().clone()  # bytes at an odd address cannot be viewed as another type
        scale, offset, largest = floats.view(torch.bfloat16).float().view(*records.shape[:2], 3, 1).unbind(-2)
        whole, matrix = records[..., HEADER:], _matrix()
        if self.bits == 4:
            half = GROUP // 2
            values = ((whole & 15).float() @ matrix[:half]).add_((whole >> 4).float() @ matrix[half:])
        else:
            values = whole.float() @ matrix
        # These sums are of whole numbers, exact in any order: what is read does not depend on the batch. All columns of
        # the matrix but the first one add up to 0: the offset, equal for all, is in the first value alone.
        first = values[..., :1].mul(matrix[0, 0]).sub_(GROUP * self._middle).mul_(scale).add_(GROUP * offset)
        values.mul_(scale)
        values[..., :1] = first.mul_(matrix[0, 0])
        place = records[..., 6:HEADER].long() % GROUP  # of a damaged record, too
        values.mul_(GROUP**-0.5).scatter_(-1, place, largest)
        bounds = torch.finfo(dtype)
        flat = values.view(len(stored), -1)[:, :size].clamp(bounds.min, bounds.max)
        return flat.to(dtype).reshape(len(stored), *shape)


@functools.cache
def _matrix() -> "Tensor":
    """Return the Hadamard matrix of `GROUP` rows, of ones and minus ones, with the signs of its columns changed."""
    import torch  # noqa: PLC0415  (slow to import; a command that reads no values needs none)

    matrix = torch.tensor([[-1.0 if SIGNS >> place & 1 else 1.0 for place in range(GROUP)]])
    while len(matrix) < GROUP:
        half = len(matrix)
        matrix = torch.cat([matrix, matrix])
        matrix[half:] *= torch.tensor([-1.0 if place // half % 2 else 1.0 for place in range(GROUP)])
    return matrix
