"""The fast path of a suffix: a script per input signature instead of phantoms.

Phantoms find out what a step before the cut amounts to; they cost milliseconds. Done once per signature of the inputs
(shapes, dtypes, devices, other arguments), their replay is recorded, and later steps follow the recording: calls before
the cut are shells, everything else is the model's own code on plain tensors, without hooks or wrappers. A suffix takes
the fast path only after it gave the same outputs as the phantoms; inputs that lead another way are left to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import Cut
from pipeline.split.frozen import Frozen
from pipeline.split.modes import accelerator_kind, eval_mode
from pipeline.split.recording import Recorder, skippable_calls
from pipeline.split.shells import Script, Shell, Stage, write_script
from pipeline.split.sources import Source
from pipeline.split.tree import Args, Kwargs

ACCELERATOR = accelerator_kind() or "cuda"
SIGNATURES = 256  # scripts kept; each holds a few objects per skipped call


class FastPath:
    """Runs the suffix's modules from stored values, by scripts.

    Dummies are `dense` for models that write in place into what a recycled layer returned. Stored arguments of the cut
    call are put into the caller's own tensors (`fills`) for callers that go on using these, as in `x = x + block(x)`.
    """

    def __init__(self, root: nn.Module, cut: Cut, frozen: Frozen, *, dense: bool, fills: bool) -> None:
        self.root, self.cut, self.frozen, self.dense = root, cut, frozen, dense
        self._scripts: OrderedDict[Hashable, Script | None] = OrderedDict()
        self._stage = Stage(cut, fills)
        self._running: list[nn.Module] = []
        self._skipped: set[tuple[str, int]] | None = None
        self._own: list[tuple[nn.Module, Any]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, values: Mapping[Source, Tensor], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Set the stage for a step with stored `values`, and return the inputs to `run` it with.

        Returns None where phantoms must serve.

        Raises:
            SplitError: the values belong to another batch than the inputs.
        """
        script = self.script(values, args, kwargs)
        if script is None:
            return None
        script.check(values)
        args, kwargs = script.inputs(values, args, kwargs)
        self._stage.begin(script, values, self._running)
        return args, kwargs

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def run(self, args: Args, kwargs: Kwargs) -> Any:
        """Return the model's output, once begun. What `torch.compile` gets to see is the model's own code.

        Raises:
            SplitError: the cut is not reached.
        """
        try:
            output = self.root(*args, **kwargs)
            if self._stage.before:
                raise SplitError(
                    f"the cut {self.cut} was not reached with these inputs; give inputs like the example's"
                )
        finally:
            if self._stage.before:
                self._stage.end()
        return output

    def remove(self) -> None:
        """Give the modules their own `forward` back."""
        for module, forward in self._own:
            del module.forward
            if forward is not None:
                module.forward = forward

    def forget(self) -> None:
        """Drop all scripts: the suffix moved to another device or dtype."""
        self._scripts.clear()

    def script(self, values: Mapping[Source, Tensor], args: Args, kwargs: Kwargs) -> Script | None:
        """Return the script for these inputs, recording it the first time; None where phantoms must serve."""
        key = signature(args, kwargs)
        if key in self._scripts:
            self._scripts.move_to_end(key)
            return self._scripts[key]
        script = self._record(values, args, kwargs)
        self._scripts[key] = script
        if len(self._scripts) > SIGNATURES:
            self._scripts.popitem(last=False)
        return script

    @torch.inference_mode(False)  # a script made while predicting also serves training
    def _record(self, values: Mapping[Source, Tensor], args: Args, kwargs: Kwargs) -> Script | None:
        args, kwargs = self.frozen.cast(args, kwargs)
        recorder = Recorder(self.root, self.cut, {source: value.clone() for source, value in values.items()})
        known = self._skipped
        with torch.no_grad(), eval_mode(self.root), self.frozen.as_phantoms():
            (recorder.run if known is None else recorder.run_to_cut)(args, kwargs)
        skipped, opened = skippable_calls(recorder, known)
        keys = {(visit.path, visit.index) for visit in skipped}
        if known is None:
            self._skipped = keys
            self._install({path for path, _ in keys}, opened)
        elif keys != known:
            return None
        return write_script(recorder, skipped, args, kwargs, dense=self.dense)

    def _install(self, paths: set[str], opened: set[str]) -> None:
        modules = dict(self.root.named_modules())
        for path in paths | {self.cut.path}:
            self._own.append((modules[path], modules[path].__dict__.get("forward")))
            hollow = path != self.cut.path and self.frozen.lacks(modules[path])
            modules[path].forward = Shell(path, modules[path].forward, self._stage, hollow=hollow)
        self._running = [modules[path] for path in opened]


def signature(args: Args, kwargs: Kwargs) -> Hashable:
    """Return what the way to the cut depends on: all of the inputs except the values of tensors."""
    named = [(name, _mark(item)) for name, item in kwargs.items()]
    autocast = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", ACCELERATOR)]
    return (*map(_mark, args), *named, *autocast)


def _mark(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.shape, item.dtype, item.device
    if isinstance(item, Mapping):
        return tuple((key, _mark(value)) for key, value in item.items())
    if isinstance(item, list | tuple):
        return tuple(map(_mark, item))
    return item if isinstance(item, Hashable) else type(item)
