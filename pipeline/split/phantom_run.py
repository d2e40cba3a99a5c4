"""One run of a model on phantoms: its own `forward`, without values until the cut and on real tensors after it.

On entry to the cut call, its phantom arguments take their stored values, or are computed from their origins; outputs
of earlier calls that the state holds take theirs when the call returns. From then on a phantom that an operation takes
is *forced*: its value is computed from known ones. A value that cannot be computed ends the run. The two kinds of run
are the search for what must be stored (`plan`) and the recording of what happens before the cut (`recording`).

A call before the cut that cannot run on phantoms (a choice of experts by value, a scan that writes into a buffer) gets
a fake `forward`, which runs nothing and returns phantoms. Their shapes follow from one real run: each tensor of the
output is one of the arguments, or has the shape and dtype of one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.cut import Argument, Cut, Input, Output, TensorSource
from pipeline.split.forward import eval_mode, eval_run, observed_calls
from pipeline.split.inputs import ExampleInputs
from pipeline.split.operations import apply, needs_values, with_integer_indices
from pipeline.split.phantom import THREAD, Interpreter, Phantom, compute, is_computable, phantoms
from pipeline.split.tree import Args, Kwargs, arguments, is_plain, map_arguments, map_tensors, tensors

CallKey: TypeAlias = tuple[str, int]
"""Path of a module and number of the call."""


@dataclass(eq=False)
class ObservedCall:
    """One call of a module before the cut.

    Attributes:
        taken: the tensors among its arguments.
        children: the calls made directly within it.
        returned: the tensors that it returned; None until it returns, which the callers of the cut never do.
        output: what it returned, with dummies for tensors: a copy, since callers may change the object later.
        read: whether a value made in it, outside its children, was computed after all.
        number: number of the call once the calls within skipped ones are no longer made.
    """

    path: str
    index: int
    taken: dict[str, Tensor]
    children: "list[ObservedCall]" = field(default_factory=list)
    returned: dict[str, Tensor] | None = None
    output: Any = None
    read: bool = False
    number: int = -1

    @property
    def key(self) -> CallKey:
        return self.path, self.index

    def inside(self) -> "Iterator[ObservedCall]":
        """Yield the calls made within this one, at any depth."""
        for child in self.children:
            yield child
            yield from child.inside()


class PhantomRun(Interpreter):
    """One run of `root`, whose frozen parameters are phantoms, that goes on from stored `values` at the cut.

    Every module is in eval mode until the cut, and in its own mode from there on.

    Attributes:
        calls: the root of the tree of calls before the cut, holding the model's own call.
        open: the calls before the cut that have not returned, outermost first, after that root; empty from the cut on.
    """

    def __init__(self, root: nn.Module, cut: Cut, values: Mapping[TensorSource, Tensor], inputs: ExampleInputs) -> None:
        self.root = root
        self.inputs = inputs
        self.cut = cut
        self.values = {source: value.clone() for source, value in values.items()}
        self.entered = False
        self.calls = ObservedCall("", -1, {})
        self.open = [self.calls]
        self._modes = ExitStack()

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        """Return the model's output, or raise SplitError: the cut is not reached, or a value cannot be computed."""
        args, kwargs = map_arguments(self._input, args, kwargs)
        former, THREAD.interpreter = THREAD.interpreter, self
        try:
            with self._modes, observed_calls(self.root, self._on_call, self._on_return):
                self._modes.enter_context(eval_mode(self.root))
                output = self.root(*args, **kwargs)
                if not self.entered:
                    raise SplitError(
                        f"the cut {self.cut} was not reached with these inputs; give inputs like the example's"
                    )
                return map_tensors(lambda _, item: self.force(item), output)
        finally:
            THREAD.interpreter = former

    def operate(self, function: Any, args: Args, kwargs: Kwargs) -> Any:
        function, args = with_integer_indices(function, args)
        if not self.entered:
            if not needs_values(function, args):
                return apply(function, args, kwargs)
            self.require_values(function, phantoms(args, kwargs))
        args, kwargs = map_arguments(lambda _, item: self.force(item), args, kwargs)
        return function(*args, **kwargs)

    def read(self, reader: object, phantom: Phantom) -> Tensor:
        if not self.entered:
            self.require_values(reader, [phantom])
        return self.force(phantom)

    def require_values(self, function: object, needed: list[Phantom]) -> None:
        """Refuse a `function` before the cut that depends on values which cannot be computed."""
        if not all(map(is_computable, needed)):
            raise SplitError(
                f"before the cut {self.cut}, {function} depends on the values of a recycled layer; cut earlier"
            )

    def force(self, item: Tensor) -> Tensor:
        """Return the value of a phantom, and any other tensor itself."""
        if not isinstance(item, Phantom):
            return item
        if not is_computable(item):
            self.on_missing_value(item)
        return compute(item)

    def on_missing_value(self, phantom: Phantom) -> None:
        """Raise the error of a value that is neither stored nor computable."""
        raise SplitError(
            f"after the cut {self.cut} the model reads a value of a recycled layer (shape {tuple(phantom.shape)}) "
            "that it did not read on the example; split with an example of this kind"
        )

    def on_return(self, call: ObservedCall, output: Any) -> None:
        """Give the `output` of a call before the cut its stored values."""
        for leaf, item in tensors(output).items():
            self._assign(item, Output(call.path, call.index, leaf))

    def on_cut(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Give the arguments of the cut call their values, and the modules their own train or eval flags."""
        for leaf, item in arguments(args, kwargs).items():
            self._assign(item, Argument(leaf))
        self.entered, self.open = True, [self.calls]
        self._modes.close()
        return map_arguments(lambda _, item: self.force(item), args, kwargs)

    def _assign(self, item: Tensor, source: TensorSource) -> None:
        """Give a phantom its value if it is stored."""
        if isinstance(item, Phantom) and source in self.values:
            value = self.values[source]
            if value.shape != item.shape:
                raise SplitError(
                    f"the state holds {tuple(value.shape)} where these inputs lead to {tuple(item.shape)} ({source}); "
                    "state and inputs must belong to the same batch, padded to the same length"
                )
            item.value = value

    def _on_call(self, path: str, index: int, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if self.entered:
            return None
        call = ObservedCall(path, index, arguments(args, kwargs))
        self.open[-1].children.append(call)
        self.open.append(call)
        return self.on_cut(args, kwargs) if call.key == (self.cut.path, self.cut.call) else None

    def _on_return(self, path: str, index: int, args: Args, kwargs: Kwargs, output: Any) -> None:
        if not self.entered:
            call = self.open.pop()
            call.returned = tensors(output)
            self.on_return(call, output)

    def _input(self, leaf: str, item: Tensor) -> Tensor:
        if not self.inputs.is_placeholder(leaf, item):
            return item
        return Phantom.like(item, Input(leaf), self.values.get(Input(leaf)))


@dataclass(frozen=True)
class FakeForward:
    """The `forward` of a module that does not run before the cut; after the cut it is the module's own.

    Attributes:
        output: what the call returns, with placeholders for tensors.
        passed: leaf of the output -> the argument that is returned there.
        like: leaf of the output -> the argument whose shape and dtype the tensor there has.
        forward: the module's own.
    """

    output: Any
    passed: Mapping[str, str]
    like: Mapping[str, str]
    forward: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward is not None and THREAD.interpreter.entered:
            return self.forward(*args, **kwargs)
        taken = arguments(args, kwargs)

        def leaf(path: str, _: Tensor) -> Tensor:
            return taken[self.passed[path]] if path in self.passed else Phantom.like(taken[self.like[path]], None)

        return map_tensors(leaf, self.output)


def observe_forward(model: nn.Module, path: str, args: Args, kwargs: Kwargs) -> FakeForward:
    """Return a fake `forward` for module `path` from one run of the full model, or raise SplitError."""
    calls: list[tuple[Args, Kwargs, Any]] = []
    on_return = lambda path, index, args, kwargs, output: calls.append((args, kwargs, output))  # noqa: E731
    with observed_calls(model, on_return=on_return, paths={path}), eval_run(model, args, kwargs):
        model(*args, **kwargs)
    given, named, output = calls[0]
    if not is_plain(output):
        raise SplitError(f"module {path!r} depends on values and returns {type(output).__name__}; cut before it")
    taken = arguments(given, named)
    passed: dict[str, str] = {}
    like: dict[str, str] = {}

    def leaf(at: str, item: Tensor) -> Tensor:
        same = [name for name, other in taken.items() if other is item]
        fits = [name for name, other in taken.items() if other.shape == item.shape and other.dtype == item.dtype]
        if not same and not fits:
            raise SplitError(
                f"module {path!r} depends on values and returns a tensor {tuple(item.shape)} that is shaped like none "
                "of its arguments; cut before it"
            )
        (passed if same else like)[at] = (same or fits)[0]
        return torch.empty(0)

    return FakeForward(map_tensors(leaf, output), passed, like)


def install_fake_forwards(root: nn.Module, fakes: Mapping[str, FakeForward]) -> None:
    """Give the modules of `root` that are named in `fakes` these `forward`s."""
    for path, fake in fakes.items():
        module = root.get_submodule(path)
        module.forward = replace(fake, forward=module.forward)
