"""A digest of any Python value, over everything it computes with: attributes, containers, tensors, functions, classes.

Nothing is listed by hand. An object is described by what `pickle` would save (`__reduce_ex__`, which runs no code of a
file); a function or class of the user's own by its source and the globals that the source names; one of an installed
package by its name. Only what a caller declares irrelevant is left out.
"""

import ast
import enum
import functools
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from pipeline.keys import JSON, content_key, digest, tensors_digest

Irrelevant: TypeAlias = Mapping[str, frozenset[str]]
"""Name of a base class (`package.Class`) or of a package -> attributes of its instances that decide no value."""

PLAIN = (type(None), bool, int, float, complex, str, bytes)
HOUSE = frozenset({"pipeline", "stages", "layer_recycling"})
"""Packages of this project, which count as installed."""
INSTALLED = {"site-packages", "dist-packages"}
DEEPEST = 150
"""Maximum depth of nested objects; Python's stack allows about two hundred."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
EMPTY_CELL = types.CellType()
"""A variable of a closure that has no value (yet); only such cells are equal to it."""
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"training"}
"""Attributes of every module that are left out: children and weights are described separately; the mode is eval."""
CLASS_ATTRIBUTES = frozenset(
    {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__qualname__", "__parameters__"}
    | {"__abstractmethods__", "_abc_impl", "__orig_bases__", "__firstlineno__", "__static_attributes__"}
    | {"__annotate_func__", "__annotations_cache__"}
)
"""Attributes of every class that do not affect what it computes."""


def fingerprint(value: Any, irrelevant: Irrelevant | None = None) -> str:
    """Return the digest of `value` as 32 hex digits; equal for values that compute the same."""
    return digest(_Describer(irrelevant or {}, {}).describe(value))


def module_fingerprints(model: nn.Module, irrelevant: Irrelevant) -> dict[str, str]:
    """Return the digest of each module by path, without children and weights; call it before the first forward pass."""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    names |= {id(item): name for name, item in model.named_parameters(remove_duplicate=False)}
    names |= {id(item): name for name, item in model.named_buffers(remove_duplicate=False)}
    describer = _Describer(irrelevant, names)
    return {name: digest(describer.module(module)) for name, module in model.named_modules()}


def tokenizer_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the state of a fast tokenizer without truncation and padding, which its last call set."""
    return {**json.loads(tokenizer.to_str()), "truncation": None, "padding": None}


class _Describer:
    """Describes values as JSON; an object that occurs again is replaced by its digest."""

    def __init__(self, irrelevant: Irrelevant, names: Mapping[int, str]) -> None:
        self.irrelevant, self.names = irrelevant, names
        self.known: dict[int, tuple[JSON, Any]] = {}  # with the object, so that no other one gets its id
        self.open: list[int] = []

    def describe(self, value: Any) -> JSON:
        if isinstance(value, PLAIN) and type(value) in PLAIN:
            return [type(value).__name__, repr(value)]
        if id(value) in self.names:
            return ["of the model", self.names[id(value)]]
        if id(value) in self.known:
            return self.known[id(value)][0]
        if id(value) in self.open:
            return ["circle", len(self.open) - self.open.index(id(value))]
        if len(self.open) == DEEPEST:
            return ["deep", _name(type(value))]
        self.open.append(id(value))
        try:
            described: JSON = digest(self._describe(value))
        finally:
            self.open.pop()
        self.known[id(value)] = described, value
        return described

    def module(self, module: nn.Module) -> JSON:
        """Describe a module without its children, parameters and buffers."""
        hooks = [[name, [self.describe(hook) for hook in vars(module).get(name, {}).values()]] for name in HOOKS]
        own = {name: value for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES}
        forward = self.describe(type(module).forward)  # of a library, unless somebody put another in its place
        return [self.describe(type(module)), forward, module.extra_repr(), self._attributes(module, own), hooks]

    @functools.singledispatchmethod
    def _describe(self, value: Any) -> JSON:
        """Describe an object by what `pickle` would save of it, or by its attributes where it cannot be saved."""
        try:
            saved = value.__reduce_ex__(4)
        except Exception:  # locks, files and the like have nothing to compute with; others refuse in their own ways
            return ["object", self.describe(type(value)), self._attributes(value, getattr(value, "__dict__", {}))]
        if isinstance(saved, str):  # a name, which does not say what a wrapped function does (one with a cache, say)
            return ["global", type(value).__qualname__, saved, self.describe(getattr(value, "__wrapped__", None))]
        make, arguments, state, items, pairs = (*saved, None, None, None)[:5]
        own = self._attributes(value, state) if isinstance(state, dict) else self.describe(state)
        parts = [self.describe(list(part)) for part in (arguments, items or (), pairs or ())]
        return ["object", self.describe(type(value)), self.describe(make), own, *parts]

    @_describe.register(torch.device)
    def _(self, value: torch.device) -> JSON:
        return "a device"  # where something is computed decides no more than its rounding

    @_describe.register(torch.dtype | torch.layout | torch.memory_format | torch.Size)
    def _(self, value: Any) -> JSON:
        return ["named", str(value)]

    @_describe.register(Tokenizer)
    def _(self, value: Tokenizer) -> JSON:
        return ["tokenizer", digest(tokenizer_state(value))]

    @_describe.register(enum.Enum)
    def _(self, value: enum.Enum) -> JSON:
        return ["enum", type(value).__qualname__, value.name]

    @_describe.register(torch.Tensor)
    def _(self, value: torch.Tensor) -> JSON:
        return ["tensor", str(tuple(value.shape)), "meta" if value.is_meta else tensors_digest({"": value})]

    @_describe.register(np.ndarray | np.generic)
    def _(self, value: Any) -> JSON:
        if value.dtype.kind in "biufc":
            return ["array", content_key(np.asarray(value)).hex()]
        return ["array", str(value.dtype), str(value.shape), self.describe(value.tolist())]

    @_describe.register(nn.Module)
    def _(self, value: nn.Module) -> JSON:  # one that no other module has registered
        state = {name: self.describe(item) for name, item in value.state_dict(keep_vars=True).items()}
        return ["module", state, [[name, self.module(one)] for name, one in value.named_modules()]]

    @_describe.register(dict | Mapping)
    def _(self, value: Mapping[Any, Any]) -> JSON:
        items = ([self.describe(key), self.describe(item)] for key, item in value.items())
        return [type(value).__name__, sorted(items, key=str)]

    @_describe.register(list | tuple)
    def _(self, value: Any) -> JSON:
        return ["list", [self.describe(item) for item in value]]

    @_describe.register(set | frozenset)
    def _(self, value: Any) -> JSON:
        return ["set", sorted((self.describe(item) for item in value), key=str)]

    @_describe.register(property)
    def _(self, value: property) -> JSON:
        return ["property", [self.describe(one) for one in (value.fget, value.fset, value.fdel)]]

    @_describe.register(staticmethod | classmethod)
    def _(self, value: Any) -> JSON:
        return [type(value).__name__, self.describe(value.__func__)]

    @_describe.register(types.MethodType | types.BuiltinMethodType)
    def _(self, value: Any) -> JSON:
        owner = value.__self__
        function = self.describe(value.__func__) if isinstance(value, types.MethodType) else value.__qualname__
        return ["method", function, None if isinstance(owner, types.ModuleType) else self.describe(owner)]

    @_describe.register(types.ModuleType)
    def _(self, value: types.ModuleType) -> JSON:
        if is_installed(value.__name__):
            return ["package", value.__name__]
        kinds = (type, types.FunctionType, types.ModuleType)  # what it takes from other files too
        used = {name: self.describe(item) for name, item in vars(value).items() if isinstance(item, kinds)}
        return ["own file", _source(value), used]

    @_describe.register(type)
    def _(self, value: type) -> JSON:
        if is_installed(value.__module__):
            return ["class", _name(value)]
        members = {name: self.describe(member) for name, member in vars(value).items() if name not in CLASS_ATTRIBUTES}
        return ["own class", value.__qualname__, [self.describe(base) for base in value.__bases__], members]

    @_describe.register(types.FunctionType)
    def _(self, value: types.FunctionType) -> JSON:
        kept = [self.describe(cell.cell_contents) for cell in value.__closure__ or () if cell != EMPTY_CELL]
        defaults = self.describe([value.__defaults__, value.__kwdefaults__])
        if is_installed(value.__module__ or ""):
            return ["function", value.__module__, value.__qualname__, kept, defaults]
        names = [name for name in sorted(set(_names(value.__code__))) if name in value.__globals__]
        used = {name: self.describe(value.__globals__[name]) for name in names}
        return ["own function", _source(value), kept, defaults, used]

    def _attributes(self, value: Any, attributes: Mapping[str, Any]) -> JSON:
        bases = {name for base in type(value).__mro__ for name in (_name(base), base.__module__.partition(".")[0])}
        left_out = frozenset[str]().union(*(self.irrelevant.get(name, ()) for name in bases))
        return [[name, self.describe(attributes[name])] for name in sorted(attributes) if name not in left_out]


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code refers to, that of the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _source(thing: Any) -> str:
    """Return the source of a function or a file, free of comments and layout; the bytecode of what has none."""
    code: types.CodeType | None = getattr(thing, "__code__", None)
    if code is not None and code.co_name == "<lambda>":  # a line may hold several
        return _bytecode(code)
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(thing))))
    except (OSError, TypeError, SyntaxError, ValueError):  # it was made at run time
        return type(thing).__qualname__ if code is None else _bytecode(code)


def _bytecode(code: types.CodeType) -> str:
    constants = [_bytecode(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


@functools.cache
def is_installed(module: str) -> bool:
    """Return whether a module is of Python, of an installed package or of this one, so not the user's own."""
    top = module.partition(".")[0]
    if top in HOUSE or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    files = (getattr(sys.modules.get(name), "__file__", None) for name in (top, module))
    return any(INSTALLED & set(Path(file).parts) for file in files if file)
