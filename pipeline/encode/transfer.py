"""Copies between the host and an accelerator while it computes.

While batch k is computed, the host reads batch k + 1 and copies it to the device, and puts the states of batch k - 1 in
place. Each direction has a stream of its own: on a common one, the inputs of batch k + 1 would queue behind the states
of batch k, and those wait for its computation. On the CPU, and on devices without streams, copies are plain ones.

Why no copy meets memory that is not ready, or that something else already uses:

- Batch k is computed once its inputs are there: the computing stream waits for an event recorded behind their copies.
- Its states are copied once they are computed: the copying stream waits for an event recorded behind the computation.
- The host reads the copies once they are made: it waits for an event recorded behind them, which is the last thing that
  the device does for batch k.
- Until then, everything that a copy reads or writes, on the device and in page-locked memory, is held here. So no
  allocator can reuse it while an operation on it is pending, on any stream: nothing depends on `record_stream`, nor on
  whether an allocator knows about streams. What the model allocates and frees is used by the computing stream alone.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from pipeline.device import has_streams, on_stream

Named: TypeAlias = dict[str, Any]
"""Tensors by name, or lists of them, one for each sample."""

AHEAD = 1
"""Batches that may be under way on the device while the host prepares the next one."""


@dataclass
class _Flight:
    """A batch under way on the device."""

    landed: torch.Event
    """Recorded behind the last copy to the host."""
    held: list[Any]
    """Everything that pending operations read or write."""
    then: list[Callable[[], None]] = field(default_factory=list)


class Transfer:
    """Copies the inputs of batches to a device and their results back, in order.

    A context: at its end, whichever, all results arrive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = (torch.Stream(device), torch.Stream(device)) if has_streams(device) else None
        self._held: list[Any] = []
        self._flights: deque[_Flight] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a batch, which are on the host, on the device, for use on its current stream."""
        if self._streams is None:
            return {name: tensor.to(self._device) for name, tensor in batch.items()}
        inward, _ = self._streams
        pinned = {name: tensor.pin_memory() for name, tensor in batch.items()}
        with on_stream(inward):
            copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
        torch.accelerator.current_stream(self._device).wait_event(inward.record_event())
        self._held += [pinned, copies]
        return copies

    def to_host(self, results: Sequence[Named], then: Callable[[Sequence[Named]], None]) -> None:
        """Call `then` with copies of `results` in host memory, once they are there.

        Lists, and tensors that are on the host, are passed on. Without streams, `then` gets `results` themselves.
        """
        if self._streams is None:
            then(results)
            return
        _, outward = self._streams
        outward.wait_event(torch.accelerator.current_stream(self._device).record_event())
        with on_stream(outward):
            copies = [{name: _to_pinned(item) for name, item in named.items()} for named in results]
        held, self._held = [*self._held, results], []
        self._flights.append(_Flight(outward.record_event(), held, [partial(then, copies)]))
        self._land(AHEAD)

    def after(self, then: Callable[[], None]) -> None:
        """Call `then` once all results so far have arrived."""
        if self._flights:
            self._flights[-1].then.append(then)
        else:
            then()

    def finish(self) -> None:
        """Wait until all results have arrived."""
        try:
            self._land(0)
        finally:
            self._flights.clear()
            self._held.clear()

    def _land(self, left: int) -> None:
        while len(self._flights) > left:
            flight = self._flights.popleft()
            flight.landed.synchronize()
            for then in flight.then:
                then()


def _to_pinned(item: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(item, list) or item.device.type == "cpu":
        return item
    return torch.empty(item.shape, dtype=item.dtype, pin_memory=True).copy_(item, non_blocking=True)
