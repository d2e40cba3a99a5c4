"""Running scores over the outputs of a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor

ALONE: Mapping[str, Any] = {"sync_on_compute": False}
"""Arguments of torchmetrics' scores: one process has all outputs, so they need no synchronisation."""


class Metrics(ABC):
    """A running score over batches, on the CPU in float32; NaN for each of `names` if there was no batch.

    With several processes, only the main one scores, with the outputs of all.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._batches = names, 0

    def update(self, output: Any, targets: "Mapping[str, Tensor]") -> None:
        """Add one batch: the model's output, and the prepared targets of its rows."""
        self._batches += 1
        self.add(read_tensor(output).detach().float().cpu(), {name: target.cpu() for name, target in targets.items()})

    def compute(self) -> dict[str, float]:
        """Return the scores over all batches."""
        return self.result() if self._batches else dict.fromkeys(self._names, float("nan"))

    @abstractmethod
    def add(self, output: "Tensor", targets: "Mapping[str, Tensor]") -> None:
        """Add one batch of outputs and targets."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Return the scores over all batches, of which there is one or more."""


def read_tensor(output: Any) -> "Tensor":
    """Return the tensor in a model's output: itself, its `logits`, the first of a tuple, or both logits of a span
    (`start_logits` and `end_logits`, each (B, T)) as (B, 2, T). Raises TrainError if there is none.
    """
    import torch  # noqa: PLC0415  (the scores' names are known without it, and it is slow to import)

    if isinstance(output, Mapping) and "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=1)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise TrainError(f"the model returned {type(output).__name__}; expected a tensor, .logits, or a tuple of them")
    return found
