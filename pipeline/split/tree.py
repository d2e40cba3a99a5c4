"""Tensors inside nested values: the arguments of a call, the output of a module.

A leaf is named by its dotted path: `0` or `1.2` among positional arguments, `hidden_states` or `past.0` among named
ones, the empty path for a value that is a tensor itself. Containers are mappings (model outputs too), lists, tuples,
named tuples and dataclasses; any other object is kept as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]


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
