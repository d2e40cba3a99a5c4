"""Tensors inside nested values: the arguments of a call, the output of a module; and comparing them.

A leaf is named by its dotted path: `0` or `1.2` among positional arguments, `hidden_states` or `past.0` among named
ones, the empty path for a value that is a tensor itself. Containers are mappings (model outputs too), lists, tuples,
named tuples and dataclasses; any other object is kept as it is.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]

TOLERANCE = 1e-6  # relative to the largest magnitude of each output tensor, in float32


def map_tensors(change: Callable[[str, Tensor], Any], value: Any, path: str = "") -> Any:
    """Return `value` with every tensor replaced by `change(path, tensor)`; an unchanged container is returned as is."""
    if isinstance(value, Tensor):
        return change(path, value)
    items = _items(value)
    if items is None:
        return value
    changed = {key: map_tensors(change, item, f"{path}.{key}" if path else str(key)) for key, item in items.items()}
    if all(changed[key] is item for key, item in items.items()):
        return value
    return _rebuilt(value, changed)


def tensors(value: Any) -> dict[str, Tensor]:
    """Return the tensors inside `value` by path, in order."""
    found: dict[str, Tensor] = {}

    def note(path: str, tensor: Tensor) -> Tensor:
        found[path] = tensor
        return tensor

    map_tensors(note, value)
    return found


def arguments(args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """Return the tensors among the arguments of a call by path."""
    return tensors({**dict(enumerate(args)), **kwargs})


def map_arguments(change: Callable[[str, Tensor], Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Return the arguments of a call with every tensor replaced by `change(path, tensor)`."""
    positional = tuple(map_tensors(change, item, str(index)) for index, item in enumerate(args))
    return positional, {name: map_tensors(change, item, name) for name, item in kwargs.items()}


def as_call(example: Any) -> tuple[Args, Kwargs]:
    """Return the arguments with which `example` calls a model: a mapping names them, a tuple or a tensor does not."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, Sequence) else ((example,), {})


def is_plain(value: Any) -> bool:
    """Return whether `value` consists of containers, tensors, numbers, strings and None only."""
    items = _items(value)
    if items is not None:
        return all(is_plain(item) for item in items.values())
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _items(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)
        }
    return None


def _rebuilt(value: Any, items: dict[Any, Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*items.values())
    if isinstance(value, list | tuple):
        return type(value)(items.values())
    new = copy.copy(value)
    for key, item in items.items():
        if isinstance(value, Mapping):
            new[key] = item
        else:
            object.__setattr__(new, key, item)
    return new


def difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest absolute difference relative to the largest finite magnitude of `expected`.

    It is infinite where shapes, non-finite values or integers differ.
    """
    if expected.shape != found.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    if not expected.numel():
        return 0.0
    ours, theirs = expected.double(), found.double()
    finite = ours.isfinite()
    same = torch.equal(ours[~finite].nan_to_num(nan=0.5), theirs[~finite].nan_to_num(nan=0.5))
    if not same or not torch.equal(finite, theirs.isfinite()):
        return float("inf")
    scale = ours[finite].abs().amax() if finite.any() else ours.new_ones(())
    gap: Any = (ours - theirs)[finite].abs().amax() if finite.any() else ours.new_zeros(())
    return float(gap / scale.clamp_min(1e-30)) if float(gap) else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """Return the bound on relative differences between two runs of the same operations in `dtype`."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps) if dtype.itemsize < 4 and dtype.is_floating_point else TOLERANCE


def mismatch(expected: Any, found: Any) -> str | None:
    """Return how the tensors in `found` differ from those in `expected`; None where only by rounding (`tolerance`)."""
    wanted, got = tensors(expected), tensors(found)
    if wanted.keys() != got.keys():
        return f"the model returns {sorted(wanted)}, the suffix {sorted(got)}"
    for leaf, tensor in wanted.items():
        gap, bound = difference(tensor.detach(), got[leaf].detach()), tolerance(tensor.dtype)
        if gap > bound:
            return (
                f"output {leaf or 'tensor'!r} differs from the full model's by {gap:.1e} (relative; bound {bound:.0e})"
            )
    return None
