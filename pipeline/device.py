"""The device that computes."""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import ConfigError

log = logging.getLogger("recycle")

MKLDNN_NAMES = {"bf16": "bf16", "bfloat16": "bf16", "float16": "fp16"}
"""Types of 16 bits by their names in settings -> in torch's functions."""


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


def free_memory(device: torch.device) -> int:
    """Return the free memory of an accelerator in bytes, 0 where it is unknown."""
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if mem_get_info is None else int(mem_get_info(device)[0])


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


def check_compiler(setting: str, device: torch.device) -> None:
    """Raise ConfigError where `setting` asks for torch.compile, and this machine cannot compile for `device`."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415  (slow to import)

    try:
        get_cpp_compiler()
    except Exception as error:  # of a kind that is imported with all of the compiler
        raise ConfigError(f"{setting} is true, and no C++ compiler is here; install g++, or set it to false") from error


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Return the operations per second of a product of large square matrices in `dtype`, the best of five.

    Their values are random: of constant ones, some accelerators make products faster.
    """
    best = 0.0
    for n in (512, size or (2048 if device.type == "cpu" else 8192)):
        a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
        for _ in range(5):
            start = time.perf_counter()
            float((a @ b)[0, 0])  # waits for the device
            seconds = time.perf_counter() - start
            best = max(best, 2 * n**3 / seconds)
        if seconds > 0.1:  # a type that the processor emulates
            break
    return best


def warn_of_emulation(setting: str, value: str, device: torch.device) -> None:
    """Warn where `setting` asks for 16 bits on a processor that has no instructions for that type.

    Its matrix products are then made value by value: on two cores of such a processor the demo's encode took 21 times
    as long in bfloat16 as in float32.
    """
    if is_emulated(value, device):
        log.warning(
            "%s is %s, which this processor computes many times slower than float32: it lacks the instructions; use "
            "another machine, or set a type of 32 bits",
            setting,
            value,
        )


def is_emulated(value: str, device: torch.device) -> bool:
    """Return whether `device` is a processor without instructions for matrix products of the type named `value`."""
    return device.type == "cpu" and value in MKLDNN_NAMES and not _multiplies(MKLDNN_NAMES[value])


def _multiplies(kind: str) -> bool:
    """Return whether the processor has instructions for matrix products of this type."""
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")())
