"""Observed forward passes: the module calls in order, and when each weight is first read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.split.modes import eval_run
from pipeline.split.tree import Args, Kwargs, arguments


@contextmanager
def observed_calls(
    model: nn.Module,
    on_call: Callable[[str, int, Args, Kwargs], tuple[Args, Kwargs] | None] | None = None,
    on_return: Callable[[str, int, Args, Kwargs, Any], None] | None = None,
    paths: Collection[str] | None = None,
) -> Iterator[None]:
    """Report the module calls of forward passes, by path and number: of all modules, or of those at `paths`.

    `on_call` gets the arguments of a call, and may return others; `on_return` gets the output as well.
    """
    handles = []

    def observe(path: str, module: nn.Module) -> None:
        numbers, running = count(), list[int]()

        def entered(_: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
            running.append(next(numbers))
            return on_call(path, running[-1], args, kwargs) if on_call else None

        def returned(_: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
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


@dataclass(frozen=True)
class Trace:
    """A forward pass. Its clock ticks at each entry to a module and each return from one.

    Attributes:
        calls: the module calls in order of entry.
        reads: name of each parameter and buffer that an operation takes -> the tick at which one first does.
        output: the model's output.
    """

    calls: list[Call]
    reads: dict[str, int]
    output: Any


def trace(model: nn.Module, args: Args, kwargs: Kwargs) -> Trace:
    """Run `model` once in eval mode, without gradients, and return what was observed."""
    observer = _Observer(model)
    with observed_calls(model, observer.on_call, observer.on_return), eval_run(model, args, kwargs), observer:
        output = model(*args, **kwargs)
    return Trace(observer.calls, observer.reads, output)


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the clock of a forward pass, and notes the parameters and buffers that operations take, views included.

    Tensors are identified by their storage, so tied parameters are read together, under all their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.reads: dict[str, int] = {}
        self._tick = -1
        self._open: list[Call] = []
        self._names: dict[int, set[str]] = {}
        parameters = model.named_parameters(remove_duplicate=False)
        for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False)]:
            if tensor.numel():
                self._names.setdefault(_storage(tensor), set()).add(name)

    def on_call(self, path: str, index: int, args: Args, kwargs: Kwargs) -> None:
        self._tick += 1
        self.calls.append(Call(path, index, self._tick))
        self._open.append(self.calls[-1])

    def on_return(self, *_: Any) -> None:
        self._tick += 1
        self._open.pop().end = self._tick

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        for tensor in arguments(args, kwargs or {}).values():
            for name in self._names.get(_storage(tensor), ()):
                self.reads.setdefault(name, self._tick)
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
