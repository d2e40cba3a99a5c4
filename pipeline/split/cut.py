"""A cut: the point in time at which the forward pass of a network is divided."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """The entry to call number `call` of module `path`; the empty path is the model itself.

    Attributes:
        blocks_before: how many of the network's blocks run before it.
        blocks: how many blocks the network has.
    """

    path: str
    call: int
    blocks_before: int
    blocks: int

    @property
    def share(self) -> float:
        """The share of the blocks that run before the cut, 0 to 1."""
        return self.blocks_before / self.blocks if self.blocks else 0.0

    @property
    def name(self) -> str:
        """The cut as `split` takes it: a module path, or `layer#2` for its third call; empty for the inputs."""
        return f"{self.path}#{self.call}" if self.call else self.path

    def __str__(self) -> str:
        place = self.path or "the inputs"
        again = f" (call {self.call})" if self.call else ""
        return f"{place}{again}, after {self.blocks_before} of {self.blocks} blocks"
