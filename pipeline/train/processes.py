"""The processes of one run, started by `torchrun` or `accelerate launch`: their ranks and what they exchange.

Each process has a share of the samples of every step. Outputs are gathered on all processes, so that losses and scores
equal those of a single process. Only the main process writes.
"""

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
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor

from pipeline.errors import TrainError

T = TypeVar("T")

log = logging.getLogger("recycle")

FAILED = "recycle/failed"
"""Key of the counter of processes that failed."""


def state() -> PartialState:
    """Return accelerate's state of the processes; the first call of each process waits for the others.

    Without an accelerator, accelerate needs `cpu=True`, or each process takes itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(state().process_index)


def world() -> int:
    """Return the number of processes."""
    return int(state().num_processes)


@contextmanager
def together() -> Iterator[None]:
    """Log on rank 0 only, and report only the first failure.

    The first process that fails raises its error; the others, which cannot continue without it, exit with 1.

    Raises:
        TrainError: another process was lost without a message.
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
        if int(dist.distributed_c10d._get_default_store().add(FAILED, 1)) > 1:
            sys.exit(1)
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's are plain RuntimeErrors
            raise TrainError(
                f"process {rank()} of {world()} lost another one ({error}); look for what ended it, and run again: "
                "training goes on from its last whole epoch"
            ) from error
        raise
    state().destroy_process_group()


def on_main(compute: Callable[[], T]) -> T:
    """Run `compute` on the main process only; return its result on every process."""
    found = [compute() if rank() == 0 else None]
    if world() > 1:
        broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def gather(tensors: Sequence[Tensor], places: Sequence[np.ndarray], padding: Sequence[float]) -> list[Tensor]:
    """Gather the tensors (N, ...) of a step, of which every process has its share (B, ...).

    Shares that differ in other sizes are padded with `padding`, one value per tensor. Gradients flow back to each
    share: with DDP, which averages over processes, they equal those of a single process.

    Args:
        tensors: this process's shares, in the same order on every process.
        places: for each process, the indices of its samples among the N, (B,) int64; the first process with a sample
            counts.
        padding: value for each tensor where one share is smaller than another.
    """
    most = max(map(len, places))
    sizes = torch.tensor([size for tensor in tensors for size in tensor.shape[1:]])
    if len(sizes):
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group=_hosts())
    longest = iter(sizes.tolist())
    first = torch.from_numpy(np.unique(np.concatenate(places), return_index=True)[1])
    gathered = []
    for tensor, value in zip(tensors, padding, strict=True):
        sizes_of_all = [most, *(next(longest) for _ in tensor.shape[1:])]
        missing = [(0, size - own) for size, own in zip(sizes_of_all, tensor.shape, strict=True)]
        padded = F.pad(tensor, [side for sides in reversed(missing) for side in sides], value=value)
        parts = _Shares.apply(padded.contiguous())
        whole = torch.cat([part[: len(own)] for part, own in zip(parts, places, strict=True)])
        gathered.append(whole[first.to(whole.device)])
    return gathered


class _Shares(torch.autograd.Function):
    """All-gather of tensors of one shape, with gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(tensor) for _ in range(world())]
        dist.all_gather(parts, tensor)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # All processes compute one loss of the same tensors, and send back the same: the sum of it is a multiple.
        return gradients[rank()] * world()


@functools.cache
def _hosts() -> dist.ProcessGroup:
    """Return a CPU process group to compare sizes, which does not synchronise accelerators."""
    return dist.new_group(backend="gloo")  # type: ignore[return-value]  # every process is in it
