"""How a model is run: train and eval flags, random state and buffers set and restored; errors of its own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from pipeline.errors import InputRefusedError, RecyclingError
from pipeline.split.cut import argument_name
from pipeline.split.tree import Args, Kwargs, arguments

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
ACCELERATOR = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cuda")
"""Kind of the accelerator that torch was built for: `cuda`, `mps`, `xpu`; `cuda` where there is none."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in eval mode, and restore the flag of each at the end."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def eval_run(model: nn.Module, args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Run the user's model on these inputs: in eval mode, without gradients, not compiled; errors are refusals."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        if any(module._compiled_call_impl is not None for module in model.modules()):  # hooks do not run inside it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        with errors_as_refusals(model, args, kwargs):
            yield


@contextmanager
def errors_as_refusals(model: nn.Module, args: Args, kwargs: Kwargs, mode: str = "eval") -> Iterator[None]:
    """Raise errors of the model's own code as InputRefusedError, except for a lack of memory."""
    try:
        yield
    except (RecyclingError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        inputs = ", ".join(
            f"{argument_name(model, leaf)} {tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}"
            for leaf, item in arguments(args, kwargs).items()
        )
        raise InputRefusedError(
            f"the model's forward fails in {mode} mode with {type(error).__name__}: {error}; its inputs are {inputs}; "
            "give inputs of the sizes, dtypes and values that the model takes"
        ) from error


def synchronise(device: torch.device) -> None:
    """Wait until what was asked of `device` is computed."""
    if device.type == ACCELERATOR:
        torch.accelerator.synchronize(device)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random state of the CPU and of the devices of `model` at the end."""
    devices = {item.device.index for item in model.parameters() if item.device.type == ACCELERATOR}
    with torch.random.fork_rng(devices=sorted(devices), device_type=ACCELERATOR):
        yield


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random state and the buffers of `model`, which modules may write to or replace, at the end."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with random_state_kept(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, former in buffers:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, former):  # a write would stop the backward pass of an earlier step
                        buffer.copy_(former)
