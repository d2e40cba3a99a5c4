"""The result of an encode: samples encoded and set aside, and the time it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample
from pipeline.encode.unit import Part


@dataclass
class EncodeCosts:
    """Seconds spent, added up over the samples of a run."""

    samples: int = 0
    reading: float = 0.0
    """Time the prefix waited for samples."""
    forward: dict[int, float] = field(default_factory=dict)
    """Per cut, the forward time from the inputs to the cut."""
    forward_samples: dict[int, int] = field(default_factory=dict)
    writing: dict[int, float] = field(default_factory=dict)

    def add(self, other: EncodeCosts) -> None:
        """Add up what is spent here and there."""
        self.samples += other.samples
        self.reading += other.reading
        for mine, others in (
            (self.forward, other.forward),
            (self.forward_samples, other.forward_samples),
            (self.writing, other.writing),
        ):
            _add(mine, others)

    def of(self, cut: int) -> dict[str, Any]:
        """Return how many samples were encoded for `cut`, and what one of them cost by step."""
        count = self.forward_samples.get(cut, 0)
        seconds = (
            {
                "read": self.reading / self.samples,
                "forward": self.forward[cut] / count,
                "write": self.writing.get(cut, 0.0) / count,
            }
            if count
            else {}
        )
        return {"samples": count, "seconds_per_sample": seconds}


@dataclass
class Outcome:
    """What became of one part of a unit, and what it cost."""

    part: Part
    bad: list[BadSample] = field(default_factory=list)
    """Samples of the part that were set aside."""
    cut_off: list[int] = field(default_factory=list)
    """Tokens lost by each text that is longer than its inputs may be."""
    promoted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Per cut, the state tensors that left the asked type's range and have a wider one."""
    costs: EncodeCosts = field(default_factory=EncodeCosts)


@dataclass
class EncodeResult:
    """What encoding the samples of one encoder did."""

    keyed: KeyedSamples
    """The data set; its bad samples include those that have no state."""
    new: list[int]
    """Samples encoded for each cut."""
    promoted: list[set[str]]
    """Per cut, the state tensors that left the range of the requested type in some segment, and have a wider one there.
    """
    cut_off: list[int] = field(default_factory=list)
    """Tokens lost by each encoded text that is longer than its inputs may be."""
    costs: EncodeCosts = field(default_factory=EncodeCosts)

    @classmethod
    def empty(cls, keyed: KeyedSamples, cuts: int) -> EncodeResult:
        """Return the result of encoding nothing for so many `cuts`."""
        return cls(replace(keyed, bad=list(keyed.bad)), [0] * cuts, [set() for _ in range(cuts)])

    def add(self, outcome: Outcome) -> None:
        """Count one more part. The caller adds its bad samples: other rows may have the same contents."""
        for cut in outcome.part.cuts:
            self.new[cut] += len(outcome.part.rows) - len(outcome.bad)
            self.promoted[cut].update(outcome.promoted.get(cut, ()))
        self.cut_off += outcome.cut_off
        self.costs.add(outcome.costs)

    def followed_by(self, later: EncodeResult) -> EncodeResult:
        """Return this result and that of a `later` encode, which started from the samples of this one, as one."""
        costs = EncodeCosts()
        for part in (self.costs, later.costs):
            costs.add(part)
        return EncodeResult(
            later.keyed,
            [here + there for here, there in zip(self.new, later.new, strict=True)],
            [here | there for here, there in zip(self.promoted, later.promoted, strict=True)],
            self.cut_off + later.cut_off,
            costs,
        )


def _add(mine: dict[int, Any], others: Mapping[int, Any]) -> None:
    for cut, value in others.items():
        mine[cut] = mine.get(cut, 0) + value
