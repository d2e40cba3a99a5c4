"""Running a network section by section: every batch through one block, then every batch through the next.

A batch is a call of the model's own `forward`, in a thread of its own (`turns`) that waits at the entry to each block
until all others are there. So it computes what it would compute alone, in the same order; what the model holds between
two blocks (skip connections, masks, the output of an encoder) waits in its frames. The weights of a block are read once
for all batches, and those of the next one are read meanwhile.

Memory-mapped weights of the right type, on the right device, are used where they are. Others are put in place when
their block is entered, and removed when the next one is; in between, the parameters are NaN, without memory.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from pipeline.errors import SplitError
from pipeline.memory import read_pages, release_pages
from pipeline.split.blocks import find_blocks
from pipeline.split.forward import Trace, eval_mode, trace
from pipeline.split.frozen import dummy
from pipeline.split.phantom import THREAD
from pipeline.split.tree import Args, Kwargs, arguments
from pipeline.split.turns import current, take_turns

Result = TypeVar("Result")

HELD = 4
"""How many times the arguments of a block a batch may hold that waits there: in its frames, and for the cuts."""


@dataclass(frozen=True)
class Placement:
    """The device on which weights compute, and their type there; None leaves each in its own."""

    device: torch.device
    dtype: torch.dtype | None = None

    def __call__(self, item: Tensor) -> Tensor:
        """Return `item` there; itself where it is there already."""
        return item.to(self.device, self.dtype if item.is_floating_point() else item.dtype)

    def absent(self, item: Tensor) -> Tensor:
        """Return a dummy of what `item` becomes there; `item` itself where it is there already."""
        like = self(item.new_zeros(()))
        is_there = (like.device, like.dtype) == (item.device, item.dtype)
        return item if is_there else dummy(like.expand(item.shape))


@dataclass(frozen=True)
class Weight:
    """A parameter of a block: its values in the file, and what it holds outside of the block."""

    item: nn.Parameter
    stored: Tensor
    absent: Tensor

    @classmethod
    def of(cls, item: nn.Parameter, placement: Placement) -> "Weight":
        """Return what is to be known of `item`, which has its values."""
        stored = item.data
        return cls(item, stored, placement.absent(stored))

    @property
    def is_moved(self) -> bool:
        """Whether it has values in its block only."""
        return self.absent is not self.stored


class Sections:
    """The blocks of a network, each of which all batches pass before any enters the next one."""

    def __init__(self, model: nn.Module, seen: Trace, placement: Placement) -> None:
        """Divide `model` at its blocks, as `seen` calls them; tensors outside of blocks are put in place now.

        Raises:
            SplitError: a weight that must be put in place with its block is read outside of it.
        """
        self._model, self._placement = model, placement
        blocks = _parameters_of_blocks(model, [call.path for call in find_blocks(model, seen.calls)])
        self._weights = {path: [Weight.of(item, placement) for item in held] for path, held in blocks.items()}
        self._order = list(self._weights)
        self._entered: str | None = None
        self._ahead: dict[str, Future[list[Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1, "section-reader")
        self._check_reads(seen)
        in_blocks = {id(weight.item) for held in self._weights.values() for weight in held}
        saved = {id(item) for item in model.state_dict(keep_vars=True).values()}
        for item in [*model.parameters(), *model.buffers()]:
            if id(item) not in in_blocks:
                item.data = placement(item.data) if id(item) in saved else item.data.to(placement.device)
        for path, held in self._weights.items():
            for weight in held:
                if weight.is_moved:
                    weight.item.__dict__["read_stored"] = partial(placement, weight.stored)
                    weight.item.data = weight.absent
            block: Any = model.get_submodule(path)
            block.forward = Section(self, path, block.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of the model share its parameters

    def run(self, calls: Sequence[Callable[[], Result]], memory: float) -> list[Result]:
        """Return the results of `calls`, forward passes of the model that hold about `memory` bytes between blocks."""
        with eval_mode(self._model):  # each call restores what it found, and others still run then
            results = take_turns(calls, lambda size: HELD * size <= memory)
        self._leave()
        return results

    def enter(self, path: str, args: Args, kwargs: Kwargs) -> None:
        """Wait until it is this thread's turn at the block at `path`; have its weights in place then."""
        if (turn := current()) is not None:
            turn.wait(path, sum(item.nbytes for item in arguments(args, kwargs).values()))
        if path == self._entered:
            return
        self._leave()
        values = (self._ahead.pop(path, None) or self._read(path)).result()
        with no_dispatch():  # nobody who observes the model's operations sees these
            for weight, value in zip(self._weights[path], values, strict=True):
                weight.item.data = value
        self._entered = path
        self._ahead = {after: self._read(after) for after in self._order[self._order.index(path) + 1 :][:1]}

    def _leave(self) -> None:
        """Take the weights of the block that was entered last out of memory."""
        for weight in self._weights.get(self._entered or "", ()):
            release_pages(weight.stored.data_ptr(), weight.stored.nbytes)
            with no_dispatch():
                weight.item.data = weight.absent
        torch.clear_autocast_cache()  # of these weights in another type
        self._entered = None

    def _read(self, path: str) -> Future[list[Tensor]]:
        def read() -> list[Tensor]:
            for weight in self._weights[path]:
                read_pages(weight.stored.data_ptr(), weight.stored.nbytes)
            return [self._placement(weight.stored) for weight in self._weights[path]]

        return self._reader.submit(read)

    def _check_reads(self, seen: Trace) -> None:
        names = {id(item): name for name, item in self._model.named_parameters()}
        for path, held in self._weights.items():
            calls = [call for call in seen.calls if call.path == path]
            for name in (names[id(weight.item)] for weight in held if weight.is_moved):
                tick = seen.reads.get(name)
                if tick is not None and not any(call.start <= tick < call.end for call in calls):
                    raise SplitError(
                        f"{name!r} is read outside of its block, {path!r}, so that it cannot be read from its file "
                        "with that block; set encode.placement to memory"
                    )


class Section:
    """A block's `forward`, with its weights in place; on phantoms, which read none, it is left as it is."""

    def __init__(self, sections: Sections, path: str, forward: Callable[..., Any]) -> None:
        self.sections, self.path, self.forward = sections, path, forward
        self.__signature__ = inspect.signature(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if THREAD.interpreter.entered:
            self.sections.enter(self.path, args, kwargs)
        return self.forward(*args, **kwargs)


def divide(model: nn.Module, example: Mapping[str, Tensor], placement: Placement) -> None:
    """Let `model` run in sections, unless it does; they are its blocks, as the calls on the batch `example` show them.

    Raises:
        InputRefusedError: the model's own code fails on the example.
        SplitError: a weight that must be put in place with its block is read outside of it.
    """
    if sections_of(model) is None:
        Sections(model, trace(model, (), dict(example)), placement)


def sections_of(model: nn.Module) -> Sections | None:
    """Return the sections that `model` was divided into; None if it runs as a whole."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return next((forward.sections for forward in forwards if isinstance(forward, Section)), None)


def run_together(model: nn.Module, calls: Iterable[Callable[[], Result]], memory: float = float("inf")) -> list[Result]:
    """Return the results of `calls`, forward passes of `model`: all together in its sections, or one after the other.

    Between sections they hold about `memory` bytes: where that is too little for all of them, they go in groups.
    """
    sections = sections_of(model)
    return [call() for call in calls] if sections is None else sections.run(list(calls), memory)


def _parameters_of_blocks(model: nn.Module, paths: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each block, by its path, without those that modules outside of blocks have too."""
    begins = tuple(f"{path}." for path in paths)
    named = model.named_parameters(remove_duplicate=False)
    outside = {id(item) for name, item in named if not name.startswith(begins)}
    return {
        path: [item for item in model.get_submodule(path).parameters() if id(item) not in outside] for path in paths
    }
