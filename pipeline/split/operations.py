"""What an operation gives on phantoms: other phantoms, or nothing where its result depends on their values."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from pipeline.errors import SplitError
from pipeline.split.phantom import Operation, Operator, Phantom, phantoms
from pipeline.split.tree import Args, Kwargs, map_arguments, map_tensors, tensors

SIZED_BY_VALUES = {
    torch.ops.aten._pack_padded_sequence.default: (0,),
    torch.ops.aten._pad_packed_sequence.default: (0,),
}
"""Operations without a meta kernel, since integers that they read decide the size of the result -> the results that
hold values of the first argument. The other results depend on those integers only."""


def needs_values(function: Operator, args: Args) -> bool:
    """Return whether the shape or result of `function` depends on values, so that it cannot run on phantoms."""
    if function is torch.ops.aten.index.Tensor:  # tagged dynamic, but integer indices fix the shape
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1]).values())
    dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return function is torch.ops.aten._local_scalar_dense.default or not dynamic.isdisjoint(function.tags)


def with_integer_indices(function: Operator, args: Args) -> tuple[Operator, Args]:
    """Return an indexing operation with its real boolean masks replaced by the places they hold."""
    aten = torch.ops.aten
    if function is aten.masked_select.default and not isinstance(args[1], Phantom):
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        function, args = aten.index.Tensor, (args[0].expand(shape), [args[1].expand(shape)])
    if function is not aten.index.Tensor:
        return function, args
    places: list[Tensor | None] = []
    for index in args[1]:
        is_mask = isinstance(index, Tensor) and not isinstance(index, Phantom) and index.dtype is torch.bool
        places += index.nonzero(as_tuple=True) if is_mask else [index]
    return function, (args[0], places, *args[2:])


def apply(function: Operator, args: Args, kwargs: Kwargs) -> Any:
    """Return the result of `function` on phantoms: phantoms with this operation as their origin."""
    if function in SIZED_BY_VALUES:
        return _apply_to_zeros(function, args, kwargs)
    if torch.Tag.inplace_view in function.tags:
        return _resize_in_place(function, args, kwargs)
    device = _device(args, kwargs)
    meta_args, meta_kwargs = map_arguments(_meta, args, kwargs)
    if meta_kwargs.get("device") is not None:
        meta_kwargs["device"] = torch.device("meta")
    with torch.no_grad():
        result = function(*meta_args, **meta_kwargs)
    if function._schema.is_mutable:
        return _write_in_place(function, args, kwargs)
    index = iter(range(len(tensors(result))))
    views = any(item.alias_info is not None for item in function._schema.returns)
    base = args[0] if views and isinstance(args[0], Phantom) else None

    def as_phantom(_: str, meta: Tensor) -> Phantom:
        phantom = Phantom(meta, device, Operation(function, args, kwargs, next(index)))
        phantom.base = base
        return phantom

    return map_tensors(as_phantom, result)


def _write_in_place(function: Operator, args: Args, kwargs: Kwargs) -> Phantom:
    """Give the phantom that an in-place operation writes to its new origin; a copy keeps the former one."""
    arguments = function._schema.arguments
    place = next(i for i, item in enumerate(arguments) if item.alias_info is not None and item.alias_info.is_write)
    target = args[place] if place < len(args) else kwargs.get(arguments[place].name)
    if not isinstance(target, Phantom):
        raise SplitError(
            f"{function} writes a value of the recycled layers into a tensor that is not made of them; make that "
            "tensor by new_zeros or zeros_like of the value, or cut elsewhere"
        )
    former = Phantom(target.meta, target.device, None)
    former.origin, former.module_output, former.value = target.origin, target.module_output, target.value
    args, kwargs = map_arguments(lambda _, item: former if item is target else item, args, kwargs)
    if target.base is not None:
        target.base.forget()
    target.origin, target.module_output, target.value = Operation(function, args, kwargs, 0), None, None
    return target


def _resize_in_place(function: Operator, args: Args, kwargs: Kwargs) -> Phantom:
    """Give a phantom the sizes that an operation such as `transpose_` gives a tensor in place."""
    target: Phantom = args[0]
    meta = target.meta.detach()
    function(meta, *args[1:], **kwargs)
    base, target.base = target.base, None  # the values of the base do not change
    _write_in_place(function, args, kwargs)
    target.meta, target.base = meta, base
    with no_dispatch():
        function(*args, **kwargs)
    return target


def _apply_to_zeros(function: Operator, args: Args, kwargs: Kwargs) -> Any:
    """Return the result of an operation whose size real arguments decide, from a run on zeros instead of phantoms."""
    device = _device(args, kwargs)
    zero_args, zero_kwargs = map_arguments(_zeros, args, kwargs)
    results = list(function(*zero_args, **zero_kwargs))
    for index in SIZED_BY_VALUES[function]:
        results[index] = Phantom(results[index].to("meta"), device, Operation(function, args, kwargs, index))
    return tuple(results)


def _zeros(_: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Phantom):
        return tensor
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _device(args: Args, kwargs: Kwargs) -> torch.device:
    """Return the device of the result: the one asked for, else that of a phantom with dimensions, if there is one."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return max(phantoms(args, kwargs), key=lambda item: item.dim() > 0).device


def _meta(_: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, Phantom):
        return tensor.meta
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
