"""The device that computes, and the precision in which it does."""

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from pipeline.errors import ConfigError

log = logging.getLogger("recycle")


def pick_device(name: str) -> torch.device:
    """Return the device that a setting names; "auto" is the accelerator if there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"encode.device is {name!r}; torch has no such device here; set auto, cpu or cuda:N"
        ) from error
    return device


@functools.cache
def has_streams(device: torch.device) -> bool:
    """Return whether `device` is an accelerator with streams, timed events and page-locked host memory."""
    if device.type == "cpu":
        return False
    try:
        torch.empty(1, device=device).record_stream(stream := torch.Stream(device))
        stream.record_event(torch.Event(device, enable_timing=True))
        return bool(torch.empty(1, pin_memory=True).is_pinned())
    except (RuntimeError, NotImplementedError):
        return False


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """Make `stream` the current one of its device, in this thread; the current device stays what it is."""
    device, former = torch.accelerator.current_device_index(), torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(former)
        torch.accelerator.set_device_index(device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model computes in `precision` on `device`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def warn_of_emulation(setting: str, value: str, device: torch.device) -> None:
    """Warn where `setting` asks for bfloat16, and this processor has no instructions for it.

    Its matrix products are then made value by value: on two cores of such a processor the demo's encode took 21 times
    as long as in float32.
    """
    if value in ("bf16", "bfloat16") and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning(
            "%s is %s, which this processor computes many times slower than float32: it lacks the instructions; encode "
            "on another machine, or set it back",
            setting,
            value,
        )
