"""Forward passes of a model: its flags, random state and buffers, its errors as refusals, its calls observed."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.device import has_streams
from pipeline.errors import InputRefusedError, RecyclingError
from pipeline.split.cut import Cut, argument_name
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
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())  # no hooks run inside it
    with (
        torch.no_grad(),
        eval_mode(model),
        torch.compiler.set_stance("force_eager") if is_compiled else nullcontext(),
        errors_as_refusals(model, args, kwargs),
    ):
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


class _Clock(threading.local):
    """The clock of a thread: the seconds for which it stood still, and whether others share the device in turns."""

    paused = 0.0
    is_shared = False

    def now(self) -> float:
        return time.perf_counter() - self.paused


CLOCK = _Clock()


class Timer:
    """Measures a run from here on: by events of its device, for which the host need not wait, or else by waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._event() if has_streams(device) and not CLOCK.is_shared else CLOCK.now()

    def lap(self) -> Callable[[], float]:
        """Return a function that gives the seconds up to here, once the device has computed what it was asked for."""
        if isinstance(began := self._began, torch.Event):
            return partial(_seconds, began, self._event())
        synchronise(self._device)
        seconds = CLOCK.now() - began
        return lambda: seconds

    def _event(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event


def _seconds(began: torch.Event, ended: torch.Event) -> float:
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000


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


@contextmanager
def observed_calls(
    model: nn.Module,
    on_call: Callable[[str, int, Args, Kwargs], tuple[Args, Kwargs] | None] | None = None,
    on_return: Callable[[str, int, Args, Kwargs, Any], None] | None = None,
    paths: Collection[str] | None = None,
) -> Iterator[None]:
    """Report the module calls of forward passes, by path and number: of all modules, or of those at `paths`.

    `on_call` gets the arguments of a call, and may return others; `on_return` gets the output as well. Calls of other
    threads are left out.
    """
    handles, thread = [], threading.get_ident()

    def observe(path: str, module: nn.Module) -> None:
        numbers, running = count(), list[int]()

        def entered(_: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
            if threading.get_ident() != thread:
                return None
            running.append(next(numbers))
            return on_call(path, running[-1], args, kwargs) if on_call else None

        def returned(_: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            number = running.pop()
            if on_return:
                on_return(path, number, args, kwargs, output)

        handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
        handles.append(module.register_forward_hook(returned, with_kwargs=True))

    for path, module in model.named_modules():
        if paths is None or path in paths:
            observe(path, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Call:
    """One call of a module: number `index` of module `path`, from tick `start` to tick `end` of the forward pass."""

    path: str
    index: int
    start: int
    end: int = -1


def trace(model: nn.Module, args: Args, kwargs: Kwargs) -> "Trace":
    """Run `model` once in eval mode, without gradients, and return what was observed."""
    seen = Trace(model, args, kwargs)
    with observed_calls(model, seen.on_call, seen.on_return), eval_run(model, args, kwargs), seen:
        seen.output = model(*args, **kwargs)
    return seen


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """An observed forward pass. Its clock ticks at each entry to a module and each return from one.

    Tensors are identified by their storage, so tied parameters are read together, under all their names.

    Attributes:
        calls: the module calls in order of entry.
        reads: name of each parameter and buffer that an operation takes, as a view too -> the tick when one first does.
        input_reads: the same of the model's inputs, by their leaves.
        output: the model's output.
    """

    def __init__(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.reads: dict[str, int] = {}
        self.input_reads: dict[str, int] = {}
        self.output: Any = None
        self._tick = -1
        self._open: list[Call] = []
        self._names: dict[int, set[str]] = {}
        self._moved: dict[int, set[str]] = {}  # parameters whose values are put in place as they are read
        parameters = model.named_parameters(remove_duplicate=False)
        for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False)]:
            if is_moved(tensor):
                self._moved.setdefault(id(tensor), set()).add(name)
            elif tensor.numel():
                self._names.setdefault(_storage(tensor), set()).add(name)
        self._leaves: dict[int, set[str]] = {}
        for leaf, tensor in arguments(args, kwargs).items():
            self._leaves.setdefault(_storage(tensor), set()).add(leaf)

    def start(self, path: str, index: int) -> int:
        """Return the tick at which call number `index` of module `path` began."""
        return next(call.start for call in self.calls if (call.path, call.index) == (path, index))

    def inputs_read(self, cut: Cut, args: Args, kwargs: Kwargs, crossing: Iterable[Tensor]) -> set[str]:
        """Return the leaves of the inputs that are read before `cut`, or are among the tensors `crossing` it."""
        start, storages = self.start(cut.path, cut.call), {_storage(tensor) for tensor in crossing}
        return {
            leaf
            for leaf, tensor in arguments(args, kwargs).items()
            if self.input_reads.get(leaf, start) < start or _storage(tensor) in storages
        }

    def on_call(self, path: str, index: int, args: Args, kwargs: Kwargs) -> None:
        self._tick += 1
        self.calls.append(Call(path, index, self._tick))
        self._open.append(self.calls[-1])

    def on_return(self, *_: Any) -> None:
        self._tick += 1
        self._open.pop().end = self._tick

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        for tensor in arguments(args, kwargs or {}).values():
            storage = _storage(tensor)
            for name in self._moved.get(id(tensor)) or self._names.get(storage) or ():
                self.reads.setdefault(name, self._tick)
            for leaf in self._leaves.get(storage, ()):
                self.input_reads.setdefault(leaf, self._tick)
        return func(*args, **(kwargs or {}))


def is_moved(tensor: Tensor) -> bool:
    """Return whether a parameter has its values in its block only (`sections`)."""
    return "read_stored" in tensor.__dict__


def value_of(tensor: Tensor) -> Tensor:
    """Return the values of a parameter or buffer, read anew where it has them in its block only."""
    return tensor.__dict__["read_stored"]() if is_moved(tensor) else tensor.detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
