"""The processes that train one run, as `torchrun` or `accelerate launch` start them: who does what, what they exchange.

Each process, by its rank, has a share of the samples of every step. What a step gives is put together on all of them,
so that losses and scores are those of one process, whatever they compare. The main process alone writes.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn

from pipeline.errors import TrainError

T = TypeVar("T")

log = logging.getLogger("recycle")

FAILED = "recycle/failed"
"""Where the processes count those of them that met an error."""


def state() -> PartialState:
    """Return what accelerate knows of the processes; the first call of several meets the others.

    It must be told where there is no accelerator: else each process would take itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def rank() -> int:
    """Return which of the processes this is, counted from 0."""
    found: int = state().process_index
    return found


def world() -> int:
    """Return how many processes there are."""
    found: int = state().num_processes
    return found


@contextmanager
def together() -> Iterator[None]:
    """Have what all processes run here appear as the work of one: it is logged once, and an error is told once.

    The first process that meets an error raises it; the others, which cannot go on without it, exit with 1.

    Raises:
        TrainError: another process was lost, and has not said why.
    """
    if world() == 1:
        yield
        return
    if rank() > 0:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail():
            sys.exit(1)
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's are plain RuntimeErrors
            raise TrainError(
                f"process {rank()} of {world()} lost another one ({error}); look for what ended it, and run again: "
                "training goes on from its last whole epoch"
            ) from error
        raise
    state().destroy_process_group()


def on_main(compute: Callable[[], T]) -> T:
    """Return on every process what `compute` gives on the main one, where alone it runs."""
    found = [compute() if rank() == 0 else None]
    if world() > 1:
        broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def wait() -> None:
    """Wait until all processes are here."""
    state().wait_for_everyone()


def gather(tensors: Sequence[Tensor], places: Sequence[np.ndarray], fill: Sequence[float]) -> list[Tensor]:
    """Return the tensors (N, ...) of a step, of each of which every process has its share (B, ...).

    Shares that differ in further sizes are filled up with `fill`, a value per tensor. Gradients of a loss that all
    processes compute of the result find their way back: with DDP, which takes the mean over processes, they are those
    of one process.

    Args:
        tensors: this process's shares, in the same order on every process.
        places: for each process, where among the N samples its own are, (B,) int64; where several have a sample, the
            first one counts.
        fill: what stands where a share is smaller than another.
    """
    most = max(map(len, places))
    sizes = torch.tensor([size for tensor in tensors for size in tensor.shape[1:]])
    if len(sizes):
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group=_hosts())
    longest = iter(sizes.tolist())
    first = torch.from_numpy(np.unique(np.concatenate(places), return_index=True)[1])
    joined = []
    for tensor, value in zip(tensors, fill, strict=True):
        parts = _Shares.apply(_padded(tensor, [most, *(next(longest) for _ in tensor.shape[1:])], value))
        whole = torch.cat([part[: len(own)] for part, own in zip(parts, places, strict=True)])
        joined.append(whole[first.to(whole.device)])
    return joined


def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers: running statistics, which each takes of its own samples."""
    if world() > 1:
        broadcast([buffer for buffer in module.buffers() if buffer.is_contiguous()])


class _Shares(torch.autograd.Function):
    """The tensors of all processes, equal in shape."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(tensor) for _ in range(world())]
        dist.all_gather(parts, tensor)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # All processes compute one loss of the same tensors, and send back the same: the sum of it is a multiple.
        return gradients[rank()] * world()


def _padded(tensor: Tensor, sizes: Sequence[int], value: float) -> Tensor:
    """Return `tensor` filled up to `sizes` on the right."""
    missing = [(0, size - own) for size, own in zip(sizes, tensor.shape, strict=True)]
    return F.pad(tensor, [side for sides in reversed(missing) for side in sides], value=value).contiguous()


@functools.cache
def _hosts() -> dist.ProcessGroup:
    """Return the group in which sizes are compared: off the accelerators, which need not be waited for."""
    return dist.new_group(backend="gloo")  # type: ignore[return-value]  # every process is in it


def _is_first_to_fail() -> bool:
    return int(dist.distributed_c10d._get_default_store().add(FAILED, 1)) == 1
