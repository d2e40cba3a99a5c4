"""Phantoms: tensors with shape, dtype and device but without values.

While a split is planned or a suffix's path to the cut is recorded, the model's own `forward` runs with phantoms in
place of the frozen parameters and of the floating-point inputs. An operation on phantoms runs on the meta device, which
costs microseconds, and its result is a phantom that holds the `Operation` it comes from. So a value can be computed
later, if the suffix turns out to read it and everything it is computed from is known. Operations on real tensors (token
ids, masks, rotary tables) run as usual.
"""

import copy
import threading
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pipeline.errors import SplitError
from pipeline.split.cut import Input, Output, Weight
from pipeline.split.tree import Args, Kwargs, arguments, map_arguments, tensors

Operator: TypeAlias = Any  # torch._ops.OpOverload

UNDIVIDED = {
    "_pad_packed_sequence": torch.ops.aten._pad_packed_sequence.default,
    "pad_sequence": torch.ops.aten.pad_sequence.default,
}
"""Functions that torch decomposes into writes to a new, real tensor; phantoms take them as one operation."""


@dataclass(frozen=True, eq=False)
class Operation:
    """The operation that a phantom comes from: result number `index` of `function(*args, **kwargs)`.

    An in-place operation changes the phantom that it writes to; `args` then holds that phantom as it was before.
    """

    function: Operator
    args: Args
    kwargs: Kwargs
    index: int

    def result(self) -> Tensor:
        """Carry the operation out; the value of every parent is known."""
        args, kwargs = map_arguments(value_or_self, self.args, self.kwargs)
        if self.function._schema.is_mutable:
            args, kwargs = map_arguments(lambda _, item: item.clone(), args, kwargs)
        with torch.no_grad():
            return list(tensors(self.function(*args, **kwargs)).values())[self.index]


Origin: TypeAlias = Operation | Weight | Input


class Interpreter:
    """Decides what an operation on phantoms does: here, outside of any run, it takes the known value of each."""

    entered = True  # whether the run has reached its cut

    def operate(self, function: Operator, args: Args, kwargs: Kwargs) -> Any:
        """Return the result of `function` on arguments of which some are phantoms."""
        for phantom in phantoms(args, kwargs):
            self.read(function, phantom)
        args, kwargs = map_arguments(value_or_self, args, kwargs)
        return function(*args, **kwargs)

    def read(self, reader: object, phantom: "Phantom") -> Tensor:
        """Return the value of `phantom` for `reader`, such as a conversion to a list or an array."""
        if phantom.value is None:
            raise SplitError(
                f"{reader} needs a value that only the recycled layers have (shape {tuple(phantom.shape)}); "
                "it is not part of the suffix's output"
            )
        return phantom.value


class Phantom(Tensor):
    """A tensor without values.

    Attributes:
        meta: the same tensor on the meta device; operations run on it.
        origin: the operation, parameter or input it comes from; None where that is unknown.
        module_output: the module output it is, if it is one: a place where the prefix can store it.
        base: the phantom it is a view of.
        value: its values, once they are known.
    """

    meta: Tensor
    origin: Origin | None
    module_output: Output | None
    base: "Phantom | None"
    value: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, origin: Origin | None) -> "Phantom":
        self: Phantom = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=int(meta.storage_offset()),
            dtype=meta.dtype,
            device=device,
            requires_grad=False,
        )
        self.meta, self.origin = meta, origin
        self.module_output = self.base = self.value = None
        return self

    @classmethod
    def like(cls, tensor: Tensor, origin: Origin | None, value: Tensor | None = None) -> "Phantom":
        """Return a phantom with the shape, dtype and device of `tensor`, which may be expanded from one element."""
        phantom = cls(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.device, origin)
        phantom.value = value
        return phantom

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        undivided = UNDIVIDED.get(getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():
            if undivided is not None:
                return cls.__torch_dispatch__(undivided, types, args, kwargs)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Operator, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        return THREAD.interpreter.operate(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the value as nested lists."""
        return THREAD.interpreter.read("Tensor.tolist", self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the value as an array."""
        return THREAD.interpreter.read("Tensor.numpy", self).numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return THREAD.interpreter.read("Tensor.numpy", self).__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Phantom(shape={tuple(self.shape)}, dtype={self.dtype}, origin={self.origin!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Phantom":
        twin = Phantom(self.meta, self.device, self.origin)
        twin.value = copy.deepcopy(self.value, memo)
        return twin

    def forget(self) -> None:
        """Drop the origin of this phantom and its bases: a write to a view changed their values."""
        self.origin = self.module_output = None
        if self.base is not None:
            self.base.forget()


class _Thread(threading.local):
    interpreter = Interpreter()


THREAD = _Thread()
"""The interpreter of this thread's operations with phantoms."""


def phantoms(args: Args, kwargs: Kwargs) -> list[Phantom]:
    """Return the phantoms among the arguments of a call."""
    return [item for item in arguments(args, kwargs).values() if isinstance(item, Phantom)]


def value_or_self(_: str, tensor: Tensor) -> Tensor:
    """Return the value of a phantom that has one, any other tensor itself."""
    return tensor.value if isinstance(tensor, Phantom) and tensor.value is not None else tensor


def unknown_ancestors(phantom: Phantom, *, up_to_outputs: bool = False) -> list[Phantom]:
    """Return the phantoms without a value that `phantom` is computed from, itself included, nearest first.

    `up_to_outputs`: whether to leave out those from which an output of a module was computed.
    """
    found: dict[int, Phantom] = {}
    pending = [phantom]
    while pending:
        item = pending.pop(0)
        if item.value is None and id(item) not in found:
            found[id(item)] = item
            if isinstance(item.origin, Operation) and not (up_to_outputs and item.module_output):
                pending += phantoms(item.origin.args, item.origin.kwargs)
    return list(found.values())


def is_computable(phantom: Phantom) -> bool:
    """Return whether the value is known, or can be computed from known ones."""
    return all(isinstance(item.origin, Operation) for item in unknown_ancestors(phantom))


def compute(phantom: Phantom) -> Tensor:
    """Return the value of a computable phantom; it and those of its ancestors are kept."""
    pending = [phantom]
    while pending:
        item = pending.pop()
        if item.value is None and isinstance(item.origin, Operation):
            missing = [one for one in phantoms(item.origin.args, item.origin.kwargs) if one.value is None]
            if missing:
                pending += [item, *missing]
            else:
                item.value = item.origin.result()
    if phantom.value is None:
        raise SplitError("a value of a recycled layer is not available")  # callers ask `is_computable` first
    return phantom.value
