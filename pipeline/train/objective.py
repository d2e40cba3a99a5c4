"""The module that is trained: its loss over the samples of all processes, and the metrics of a validation."""

import copy
import itertools
import logging
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, recursively_apply
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.split.forward import state_kept
from pipeline.tasks import Metrics, Task
from pipeline.train import processes
from pipeline.train.loader import Batch

log = logging.getLogger("recycle")

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
    try:
        with torch.no_grad(), state_kept(suffix):
            suffix(batch.state, **batch.inputs)
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        return False
    return True


def evaluate(
    suffix: nn.Module, task: Task, batches: Iterable[Batch], accelerator: Accelerator, metrics: Metrics | None = None
) -> dict[str, Any]:
    """Return the task's metrics over `batches`, or the `metrics` that are given, in eval mode and without gradients.

    With the targets, metrics get the `row` of each sample in the sample table.
    """
    suffix.eval()
    if processes.world() > 1:  # running statistics differ between processes: those of the main one count
        broadcast([buffer for buffer in suffix.buffers() if buffer.is_contiguous()])
    metrics = task.metrics() if metrics is None else metrics
    with torch.no_grad():
        for batch in batches:
            with accelerator.autocast():
                output = suffix(batch.state, **batch.inputs)
            named = batch.targets | {"row": batch.rows.to(accelerator.device)}
            output, targets = of_all_processes(output, replace(batch, targets=named))
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


def prepare(objective: Objective, training: Iterable[Batch], accelerator: Accelerator) -> nn.Module:
    """Return `objective` on its device; with several processes, its gradients are averaged over them."""
    to_device(objective, accelerator.device)
    if accelerator.num_processes > 1:
        _share_statistics(objective, accelerator.device)
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=_leaves_parameters_out(objective, next(iter(training))),
            broadcast_buffers=False,  # `evaluate` shares them, once per epoch; a loss's memory is the same everywhere
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: nn.Module = accelerator.prepare(objective, device_placement=[False])
    return prepared


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move `model` in place, unless it is there, and a suffix would forget the inputs that it has recorded.

    Shared parameters stay shared on backends that replace parameters when moving.
    """
    found = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if found == {device}:
        return
    names: dict[int, list[str]] = {}
    for name, item in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(item), []).append(name)
    model.to(device)
    for first, *others in names.values():
        for path, _, own in (name.rpartition(".") for name in others):
            model.get_submodule(path).register_parameter(own, model.get_parameter(first))


def _leaves_parameters_out(objective: Objective, batch: Batch) -> bool:
    """Return whether a step may leave a parameter without gradient: an unused pooler, or a dropped layer.

    DDP has to be told, and then searches the graph at every step.
    """
    if any(_drops_layers(module) for module in objective.modules()):
        return True
    state = None if objective.loss is None else copy.deepcopy(objective.loss.state_dict())
    parameters = [item for item in objective.parameters() if item.requires_grad]
    gradients = torch.autograd.grad(objective.eval()(batch), parameters, allow_unused=True)
    if objective.loss is not None and state is not None:  # a memory has seen the batch
        objective.loss.load_state_dict(state)
    return any(gradient is None for gradient in gradients)


def _drops_layers(module: nn.Module) -> bool:
    """Return whether whole layers are dropped at random (`layerdrop` in transformers)."""
    settings = vars(module) | getattr(getattr(module, "config", None), "__dict__", {})
    return any("layerdrop" in name and value for name, value in settings.items())


def _share_statistics(module: nn.Module, device: torch.device) -> None:
    """Synchronise the statistics of trained batch norms over processes where torch can; it cannot on CPUs."""
    module.train()
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.training]
    unsynchronised = [one for one in norms if device.type == "cpu" or not _synchronise(one)]
    if unsynchronised:
        log.warning(
            "%d batch norms, such as %s, take the statistics of each process's own samples on %s: the run differs from "
            "that of one process",
            *(len(unsynchronised), type(unsynchronised[0]).__name__, device.type),
        )


def _synchronise(norm: Any) -> bool:
    """Turn a batch norm into a synchronised one in place; return whether its type has one."""
    kinds: dict[type, type] = dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), nn.SyncBatchNorm)
    if "timm.layers" in sys.modules:  # its networks' batch norms have the activation in them
        layers = sys.modules["timm.layers"]
        kinds[layers.BatchNormAct2d] = layers.SyncBatchNormAct
    if type(norm) not in kinds:
        return False
    norm.process_group = None  # that of all processes
    norm.__class__ = kinds[type(norm)]
    return True
