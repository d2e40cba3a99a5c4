"""Which parameters and buffers of a model a stretch of its execution reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.split.tree import Args, Kwargs, arguments


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, notes in `names` each parameter and buffer that an operation takes, through views as well.

    Tensors are told apart by their storage, so tied parameters are read together, under all their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
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
            self.names |= self._by_storage.get(_storage(tensor), set())
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
