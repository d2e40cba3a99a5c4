"""The way of a suffix to its cut at run time: the replay of a recording, made once per kind of input.

Inputs of one kind have the same signature: shapes, dtypes, devices, other arguments. The first time, the way to the cut
is recorded on phantoms, which costs milliseconds. A step that replays it gets to the cut in microseconds: stubs take
the place of the modules whose calls are skipped, and everything else is the model's own code on plain tensors. A stub
returns what the recording says: stored tensors where the state holds them, so that every later reference to that output
is right, its own arguments where the call passed them on, and dummies without memory for values that nobody reads. From
the cut on every stub is the module's own `forward`, and there is no other hook or wrapper.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import RecyclingError, SplitError
from pipeline.split.cut import Argument, Cut, TensorSource
from pipeline.split.forward import ACCELERATOR, OUT_OF_MEMORY, errors_as_refusals, state_kept
from pipeline.split.frozen import FrozenParameters
from pipeline.split.inputs import ExampleInputs
from pipeline.split.observation import seeded_calls
from pipeline.split.phantom import THREAD
from pipeline.split.phantom_run import CallKey
from pipeline.split.recording import Recorder, Recording, make_recording
from pipeline.split.tree import Args, Kwargs, arguments, map_arguments, mismatch

SIGNATURES = 256  # recordings kept; each holds a few objects per skipped call


class Replay:
    """Runs the modules of a suffix from stored values, by recordings.

    Attributes:
        dense: whether dummies have memory, for models that write into what a recycled layer returned.
        fills: whether stored arguments of the cut call are put into the caller's own tensors, for callers that go on
            using these, as in `x = x + block(x)`.
        before: whether a step is running that has not reached the cut; the next attributes describe that step.
        recording: what it follows, or the last step followed.
        values: the stored tensors, until the cut.
        counts: how often each stub was called.
    """

    def __init__(self, root: nn.Module, cut: Cut, frozen: FrozenParameters, inputs: ExampleInputs) -> None:
        """Prepare `root`, whose forward gets to `cut` with the `frozen` parameters missing."""
        self.root, self.cut, self.frozen, self.inputs = root, cut, frozen, inputs
        self.dense = self.fills = False
        self.before = False
        self.recording: Recording | None = None
        self.values: Mapping[TensorSource, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self._training: list[nn.Module] = []  # to be put back in train mode at the cut
        self._recordings: dict[Hashable, Recording] = {}
        self._first: Recording | None = None
        self._stubbed: set[str] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Start a step with stored `values`, and return the inputs to `run` it with; raises as `Suffix.forward`."""
        return self._start(self.record(values, args, kwargs), values, args, kwargs)

    def record(self, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs) -> Recording:
        """Return the recording for inputs of this kind, made unless it is known; raises as `Suffix.forward`."""
        key = signature(args, kwargs)
        recording = self._recordings.get(key)
        if recording is None or any(values[source].shape != shape for source, shape in recording.shapes.items()):
            with errors_as_refusals(self.root, args, kwargs):
                recording = self._recordings[key] = self._record(values, args, kwargs)
            if len(self._recordings) > SIGNATURES:
                del self._recordings[next(iter(self._recordings))]
        return recording

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def run(self, args: Args, kwargs: Kwargs) -> Any:
        """Return the model's output, after `begin`. `torch.compile` sees only the model's own code."""
        try:
            output = self.root(*args, **kwargs)
            if self.before:
                raise SplitError(
                    f"the cut {self.cut} was not reached with these inputs; give inputs like the example's"
                )
        except Exception as error:
            if not self.before or isinstance(error, (RecyclingError, *OUT_OF_MEMORY)):
                raise
            raise SplitError(
                f"before the cut {self.cut} the model's code fails with dummies in place of what recycled layers "
                f"return ({type(error).__name__}: {error}); give inputs like the example's, split with an example of "
                "this kind, or cut elsewhere"
            ) from error
        finally:
            if self.before:
                self._leave()
        return output

    def enter(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Reach the cut; return the arguments of its call with the stored values that are still missing."""
        values, recording = self.values, self.recording
        self._leave()
        if recording is None or not recording.late:
            return args, kwargs
        dummies = {id(item) for item in recording.dummies.values()}

        def with_stored(leaf: str, item: Tensor) -> Tensor:
            if leaf not in recording.late:
                return item
            value = values[Argument(leaf)]
            if not self.fills or value.requires_grad or id(item) in dummies:
                return value
            item.data = value
            return item

        return map_arguments(with_stored, args, kwargs)

    def forget(self) -> None:
        """Drop all recordings: the suffix moved to another device or dtype, or the kind of replay changed."""
        self._recordings.clear()

    def _start(
        self, recording: Recording, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        args, kwargs = recording.inputs(values, args, kwargs)
        self.recording, self.values, self.before = recording, values, True
        self.counts.clear()
        self._training = [module for module in recording.running if module.training]
        for module in self._training:
            module.training = False
        return args, kwargs

    def _leave(self) -> None:
        self.before, self.values = False, {}
        for module in self._training:
            module.training = True

    @torch.inference_mode(False)  # a recording made while predicting also serves training
    @torch.no_grad()
    def _record(self, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs) -> Recording:
        """Record the way to the cut.

        The first recording runs to the end: what is read after the cut decides which calls are skipped. Later ones skip
        the same calls, and end at the cut. Inputs that lead there by other calls are recorded to the end again, and the
        replay must then return what that run returned.
        """
        first = self._first
        with state_kept(self.root):
            if first is not None:
                recording, _ = self._run_on_phantoms(values, args, kwargs, among=first.calls[0])
                if recording.calls == first.calls:
                    return recording
            with seeded_calls(self.root, self.cut):
                recording, expected = self._run_on_phantoms(values, args, kwargs)
                self._first = first or recording
                if first is None:
                    return recording
                copies = {source: value.clone() for source, value in values.items()}
                found = self.run(*self._start(recording, copies, args, kwargs))
                if reason := mismatch(expected, found):
                    raise SplitError(
                        f"these inputs lead to the cut {self.cut} by other calls than the example's, which cannot be "
                        f"replayed ({reason}); give inputs like the example's, split with an example of this kind, or "
                        "cut elsewhere"
                    )
        return recording

    def _run_on_phantoms(
        self, values: Mapping[TensorSource, Tensor], args: Args, kwargs: Kwargs, among: Set[CallKey] | None = None
    ) -> tuple[Recording, Any]:
        """Return a recording that skips calls `among` these, or of a run to the end any, and the output of that run."""
        args, kwargs = self.frozen.cast(args, kwargs)
        recorder = Recorder(self.root, self.cut, values, self.inputs, to_the_end=among is None)
        with self.frozen.as_phantoms():
            output = recorder.run(args, kwargs)
        recording = make_recording(recorder, arguments(args, kwargs), among, dense=self.dense)
        for path in ({path for path, _ in recording.results} | {self.cut.path}) - self._stubbed:
            module = self.root.get_submodule(path)
            incomplete = path != self.cut.path and self.frozen.lacks(module)
            module.forward = Stub(self, path, module.forward, incomplete=incomplete)
            self._stubbed.add(path)
        return recording, output


class Stub:
    """A module's `forward`, except before the cut."""

    def __init__(self, replay: Replay, path: str, forward: Callable[..., Any], *, incomplete: bool) -> None:
        """`incomplete`: the suffix does not hold all weights of the module, so that its own `forward` must not run."""
        self.replay, self.path, self.forward, self.incomplete = replay, path, forward, incomplete
        self.at_cut = path == replay.cut.path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replay, recording = self.replay, self.replay.recording
        if replay.before and recording is not None:
            index = replay.counts[self.path]
            replay.counts[self.path] = index + 1
            if self.at_cut and index == recording.cut_call:
                args, kwargs = replay.enter(args, kwargs)
            elif (result := recording.results.get((self.path, index))) is not None:
                return result(replay.values, args, kwargs)
        elif recording is not None and (self.incomplete or self.at_cut) and THREAD.interpreter.entered:
            self._refuse_recomputation(recording, args, kwargs)
        return self.forward(*args, **kwargs)

    def _refuse_recomputation(self, recording: Recording, args: Args, kwargs: Kwargs) -> None:
        """Refuse a call with dummies after the cut: gradient checkpointing repeats what was before it."""
        taken = arguments(args, kwargs) if recording.late and not self.incomplete else {}
        if self.incomplete or any(taken[leaf].isnan().all() for leaf in recording.late & taken.keys()):
            raise SplitError(
                f"{self.path!r} would run again without what recycled layers gave it: gradient checkpointing "
                f"recomputes a region that holds the cut {self.replay.cut}; cut where one begins, or make it smaller"
            )


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
