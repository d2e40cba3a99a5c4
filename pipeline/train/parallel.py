"""A module prepared for training in several processes: gradients and batch statistics over all samples."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.train.loader import Batch
from pipeline.train.objective import Objective

log = logging.getLogger("recycle")


def prepare(objective: Objective, batches: Iterable[Batch], accelerator: Accelerator) -> nn.Module:
    """Return `objective` on its device; with several processes, its gradients are averaged over them.

    `batches` are the training batches.
    """
    to_device(objective, accelerator.device)
    if accelerator.num_processes > 1:
        _share_statistics(objective, accelerator.device)
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=_leaves_parameters_out(objective, next(iter(batches))),
            broadcast_buffers=False,  # `evaluate` shares them, once per epoch; a loss's memory is the same everywhere
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: nn.Module = accelerator.prepare(objective)
    return prepared


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move `model` in place; shared parameters stay shared on backends that replace parameters when moving."""
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
    for plain, synchronised in _kinds():
        if type(norm) is plain:
            norm.process_group = None  # that of all processes
            norm.__class__ = synchronised
            return True
    return False


def _kinds() -> Iterator[tuple[Any, Any]]:
    yield from ((plain, nn.SyncBatchNorm) for plain in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    if "timm.layers" in sys.modules:  # its networks' batch norms have the activation in them
        layers = sys.modules["timm.layers"]
        yield layers.BatchNormAct2d, layers.SyncBatchNormAct
