"""One watched forward pass of a model: its module calls in order, and when it first reads which weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.split.modes import eval_run
from pipeline.split.tree import Args, Kwargs, arguments


@dataclass
class Call:
    """One call of a module: number `index` of module `path`, from tick `start` to tick `end` of the forward pass."""

    path: str
    index: int
    start: int
    end: int = -1


@dataclass(frozen=True)
class Trace:
    """A forward pass.

    Attributes:
        calls: the module calls in order of entry.
        reads: name of each parameter and buffer that an operation took -> the tick at which one first did.
        output: what the model returned.
    """

    calls: list[Call]
    reads: dict[str, int]
    output: Any

    def start_of(self, path: str, index: int) -> int:
        """Return the tick at which call number `index` of module `path` was entered."""
        return next(call.start for call in self.calls if (call.path, call.index) == (path, index))


def trace(model: nn.Module, args: Args, kwargs: Kwargs) -> Trace:
    """Run `model` once in eval mode, without gradients, and return what was seen.

    Raises:
        InputRefusedError: its own code fails on these inputs.
    """
    watch = _Watch()
    handles = []
    for path, module in model.named_modules():
        handles += [module.register_forward_pre_hook(watch.enter(path)), module.register_forward_hook(watch.leave)]
    try:
        with eval_run(model, args, kwargs), _Reads(model, watch) as reads:
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(watch.calls, reads.first, output)


class _Watch:
    """Counts ticks: entries to modules and returns from them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.tick = -1
        self._open: list[Call] = []
        self._counts: dict[str, int] = {}

    def enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.tick += 1
            call = Call(path, self._counts.get(path, 0), self.tick)
            self._counts[path] = call.index + 1
            self.calls.append(call)
            self._open.append(call)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tick += 1
        self._open.pop().end = self.tick


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, notes which parameters and buffers operations take, through views as well.

    Tensors are told apart by their storage, so tied parameters are read together, under all their names.
    """

    def __init__(self, model: nn.Module, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: dict[str, int] = {}
        self._watch = watch
        self._by_storage: dict[int, set[str]] = {}
        held: list[tuple[str, Tensor]] = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in held:
            if tensor.numel():
                self._by_storage.setdefault(_storage(tensor), set()).add(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        for tensor in arguments(args, kwargs or {}).values():
            for name in self._by_storage.get(_storage(tensor), ()):
                self.first.setdefault(name, self._watch.tick)
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
