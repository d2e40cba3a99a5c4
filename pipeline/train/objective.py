"""Loss of a batch and metrics of many, over the samples of all processes, as a single process computes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from pipeline.tasks import Task
from pipeline.train import processes
from pipeline.train.loader import Batch

ONE_VALUE = "more than 1 value per channel"
"""Part of the message of torch's batch norms on a single value."""


class Objective(nn.Module):
    """The module that is trained: batch -> loss, with the parameters of the loss if it has any."""

    def __init__(self, suffix: nn.Module, task: Task) -> None:
        super().__init__()
        self.suffix = suffix
        self.task = task
        self.loss = task.loss_module

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss of a step, a scalar, over the shares of all processes and the same on each."""
        output, targets = of_all_processes(self.suffix(batch.state, **batch.inputs), batch)
        loss: Tensor = self.task.loss(output, targets)
        return loss


def trains_on_one(suffix: nn.Module, batch: Batch) -> bool:
    """Return whether `suffix` can run in training mode on the single sample of `batch`, on the CPU.

    It cannot where a batch norm would compute statistics of a single value. `suffix` is not changed.
    """
    before = {name: buffer.clone() for name, buffer in suffix.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            suffix(batch.state, **batch.inputs)
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        return False
    finally:
        for name, buffer in suffix.named_buffers():
            if not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
    return True


def evaluate(suffix: nn.Module, task: Task, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Return the task's metrics over `batches`, in eval mode and without gradients."""
    suffix.eval()
    processes.share_buffers(suffix)
    metrics = task.metrics()
    with torch.no_grad():
        for batch in batches:
            with accelerator.autocast():
                output = suffix(batch.state, **batch.inputs)
            output, targets = of_all_processes(output, batch)
            if accelerator.is_main_process:
                metrics.update(output, targets)
    return processes.on_main(metrics.compute)


def of_all_processes(output: Any, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """Return the outputs and the targets of a step of all processes, in the order of a single process.

    Tensors of the output with a row per sample are gathered; everything else stays that of this process.
    """
    if len(batch.places) < 2:
        return output, batch.targets

    def has_rows(item: Any) -> bool:
        return isinstance(item, Tensor) and item.dim() > 0 and len(item) == len(batch.rows)

    own: list[Tensor] = []
    recursively_apply(own.append, output, test_type=has_rows)
    padding = [0.0] * len(own) + [batch.padding.get(name, 0.0) for name in batch.targets]
    gathered = iter(processes.gather([*own, *batch.targets.values()], batch.places, padding))
    output = recursively_apply(lambda _: next(gathered), output, test_type=has_rows)
    return output, dict(zip(batch.targets, gathered, strict=True))
