"""Phantoms: tensors with shape, dtype and device but without values.

Before the cut the suffix runs the model's own `forward` on phantoms in place of the parameters it does not hold.
An operation on phantoms runs on the meta device, which costs microseconds, and its result is a phantom that remembers
how it was made: a `Step`. So a value can still be had later, if it should turn out that the suffix reads it and that
everything it is made from is at hand. Operations on real tensors (token ids, masks, rotary tables) run as usual.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pipeline.errors import SplitError
from pipeline.split.sources import Input, Output, Weight
from pipeline.split.tree import Args, Kwargs, arguments, map_arguments, tensors

Operator: TypeAlias = Any  # torch._ops.OpOverload

WHOLE = {
    "_pad_packed_sequence": torch.ops.aten._pad_packed_sequence.default,
    "pad_sequence": torch.ops.aten.pad_sequence.default,
}
"""Functions that torch takes apart into writes to a new, real tensor; phantoms go through them as one operation."""


@dataclass(frozen=True, eq=False)
class Step:
    """The operation that made a phantom: result number `index` of `function(*args, **kwargs)`.

    An in-place operation changes the phantom it writes to; the arguments then hold that phantom's former self.
    """

    function: Operator
    args: Args
    kwargs: Kwargs
    index: int

    def parents(self) -> list[Phantom]:
        """Return the phantoms among the arguments."""
        return [item for item in arguments(self.args, self.kwargs).values() if isinstance(item, Phantom)]

    def result(self) -> Tensor:
        """Carry the operation out; every parent has its value."""
        args, kwargs = map_arguments(value_or_self, self.args, self.kwargs)
        if self.function._schema.is_mutable:
            args, kwargs = map_arguments(lambda _, item: item.clone(), args, kwargs)
        with torch.no_grad():
            return list(tensors(self.function(*args, **kwargs)).values())[self.index]


class Interpreter(Protocol):
    """Decides what an operation on phantoms does; there is one per running replay."""

    entered: bool

    def operate(self, function: Operator, args: Args, kwargs: Kwargs) -> Any:
        """Return the result of `function` on arguments of which some are phantoms."""

    def read(self, reader: object, phantom: Phantom) -> Tensor:
        """Return the value of `phantom`, which `reader` takes out of torch's hands."""


class Phantom(Tensor):
    """A tensor without values.

    Attributes:
        shadow: the same tensor on the meta device; operations run on it.
        origin: the operation or the leaf it comes from; None where its making was not seen.
        tag: the module output it is, if it is one: a place from which the prefix can store it.
        base: the phantom it is a view of.
        value: its values, once they are known.
    """

    shadow: Tensor
    origin: Step | Weight | Input | None
    tag: Output | None
    base: Phantom | None
    value: Tensor | None

    @staticmethod
    def __new__(cls, shadow: Tensor, device: torch.device, origin: Step | Weight | Input | None) -> Phantom:
        self: Phantom = torch.Tensor._make_wrapper_subclass(
            cls,
            shadow.shape,
            strides=shadow.stride(),
            storage_offset=int(shadow.storage_offset()),
            dtype=shadow.dtype,
            device=device,
            requires_grad=False,
        )
        self.shadow, self.origin = shadow, origin
        self.tag = self.base = self.value = None
        return self

    @classmethod
    def like(cls, tensor: Tensor, origin: Weight | Input | None) -> Phantom:
        """Return a phantom with the shape, dtype and device of `tensor`, which may be a stand-in without strides."""
        shadow = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return cls(shadow, tensor.device, origin)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        whole = WHOLE.get(getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():
            if whole is not None:
                return cls.__torch_dispatch__(whole, types, args, kwargs)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Operator, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        interpreter: Interpreter | None = getattr(_running, "interpreter", None)
        return (interpreter or _AFTERWARDS).operate(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the value as nested lists."""
        return self._read("Tensor.tolist").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the value as an array."""
        return self._read("Tensor.numpy").numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._read("Tensor.numpy").__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _read(self, reader: str) -> Tensor:
        interpreter: Interpreter | None = getattr(_running, "interpreter", None)
        return (interpreter or _AFTERWARDS).read(reader, self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Phantom(shape={tuple(self.shape)}, dtype={self.dtype}, origin={self.origin!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Phantom:
        twin = Phantom(self.shadow, self.device, self.origin)
        twin.value = copy.deepcopy(self.value, memo)
        return twin

    def forget(self) -> None:
        """A view was written to: how this phantom and its bases were made no longer tells their values."""
        self.origin = self.tag = None
        if self.base is not None:
            self.base.forget()


_running = threading.local()


@contextmanager
def interpreting(interpreter: Interpreter) -> Iterator[None]:
    """Let `interpreter` decide on operations with phantoms in this thread."""
    former = getattr(_running, "interpreter", None)
    _running.interpreter = interpreter
    try:
        yield
    finally:
        _running.interpreter = former


def before_the_cut() -> bool:
    """Tell whether a replay is running in this thread that has not reached its cut."""
    interpreter: Interpreter | None = getattr(_running, "interpreter", None)
    return interpreter is not None and not interpreter.entered


class _Afterwards:
    """Outside of a replay (in the backward pass) a phantom stands for the value it was given, or cannot be used."""

    entered = True

    def operate(self, function: Operator, args: Args, kwargs: Kwargs) -> Any:
        for item in phantoms(args, kwargs):
            self.read(function, item)
        args, kwargs = map_arguments(value_or_self, args, kwargs)
        return function(*args, **kwargs)

    def read(self, reader: object, phantom: Phantom) -> Tensor:
        if phantom.value is None:
            raise SplitError(
                f"{reader} needs a value that only the recycled layers have (shape {tuple(phantom.shape)}); "
                "it is not part of the suffix's output"
            )
        return phantom.value


_AFTERWARDS = _Afterwards()


def phantoms(args: Args, kwargs: Kwargs) -> list[Phantom]:
    """Return the phantoms among the arguments of a call."""
    return [item for item in arguments(args, kwargs).values() if isinstance(item, Phantom)]


def value_or_self(_: str, tensor: Tensor) -> Tensor:
    """Return the value of a phantom that has one, any other tensor itself."""
    return tensor.value if isinstance(tensor, Phantom) and tensor.value is not None else tensor
