"""The rate of an encode, beside what the machine can compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.encode.ragged import Sample, length
from pipeline.encode.unit import EncodeCosts

if TYPE_CHECKING:
    from pipeline.precision import ComputeFormat

MEASURED_FROM = 5.0
"""Seconds of an encode below which the machine's peak is not measured, which takes up to a second."""


@dataclass(frozen=True)
class EncodeRate:
    """Samples and tokens per second of a whole encode: reading, computing and writing."""

    samples_per_second: float
    tokens_per_second: float | None
    """Without padding; None of samples that are no texts."""
    matrix_share: float | None
    """Operations per second over those of a product of large matrices on the same device; None where unknown."""
    precision: str

    @classmethod
    def of(
        cls,
        costs: EncodeCosts,
        form: "ComputeFormat",
        flops: Sequence[tuple[int, int]] | None,
        example: Sequence[Sample],
    ) -> "EncodeRate | None":
        """Return the rate of an encode that cost `costs`; None where nothing was encoded.

        `flops` are the operations before and after each cut of a sample of `example`, padded to its longest.
        """
        from pipeline.device import matrix_peak  # noqa: PLC0415  (torch is slow to import, and often nothing is to do)

        if not costs.samples:
            return None
        is_text = any(not tensor.is_floating_point() and tensor.dim() == 1 for tensor in example[0].values())
        tokens = costs.positions / costs.elapsed if is_text else None
        share = None
        if flops and costs.elapsed > MEASURED_FROM:
            cut, (operations, _) = max(enumerate(flops), key=lambda item: item[1][0])
            if costs.forward_samples.get(cut) == costs.samples:  # else some samples went to a lower cut only
                alike = costs.padded / max(map(length, example)) if costs.padded else costs.samples
                share = operations * alike / costs.elapsed / matrix_peak(form.device, form.compute_dtype)
        return cls(costs.samples / costs.elapsed, tokens, share, form.precision)

    def __str__(self) -> str:
        parts = [f"{self.samples_per_second:,.1f} samples/s"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.matrix_share is not None:
            parts.append(f"{self.matrix_share:.0%} of the operations per second of a matrix product ({self.precision})")
        return ", ".join(parts)
