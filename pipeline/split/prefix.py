"""The frozen part of a split: runs the full model up to the cut and returns the state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.cut import Cut, TensorSource
from pipeline.split.forward import value_of
from pipeline.split.inputs import ExampleInputs, TensorSpec
from pipeline.split.layout import BatchLayout, batch_size
from pipeline.split.observation import Observation, observe
from pipeline.split.plan import SplitPlan

State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of the state: its name, where the model has it, and where its batch axis is there."""

    name: str
    source: TensorSource
    layout: BatchLayout
    spec: TensorSpec


class Prefix:
    """The layers before the cut, as a function from inputs to state. It holds the model; it copies no weights.

    Attributes:
        cut: where the model is cut.
        spec: dtype and shape of each tensor of the state.
        inputs: how the example called the model, and which of its tensors are read before the cut.
        module_digests: digests of the model's modules from before its first forward pass, for recipes; None if unknown.
    """

    def __init__(self, model: nn.Module, plan: SplitPlan, slots: Sequence[Slot]) -> None:
        """Use `split`, which finds `plan` and `slots` and proves them."""
        self.model = model
        self.cut: Cut = plan.cut
        self.inputs: ExampleInputs = plan.inputs
        self.module_digests: Mapping[str, str] | None = None
        self.slots = tuple(slots)
        self.spec: Mapping[str, TensorSpec] = {slot.name: slot.spec for slot in slots}
        self._plan = plan

    def __call__(self, *args: Any, **inputs: Any) -> State:
        """Return the state of a batch, each tensor with the batch axis first: (B, ...).

        Runs in eval mode without gradients, stops at the cut, and restores the modules' train or eval flags. At the
        cut 0 the state holds the floating-point inputs themselves, not copies.

        Raises:
            InputRefusedError: the model's own code fails on these inputs.
            SplitError: these inputs do not lead to the cut.
        """
        return Capture([self])(*args, **inputs)[0]

    def weights(self, without: str | None = None) -> Mapping[str, Tensor]:
        """Return every parameter and buffer that is read before the cut, by its name in the full model, sorted.

        That of the name `without` is left out.

        Of a network that runs section by section, each is read when it is looked up, and not kept.
        """
        held: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        held |= dict(self.model.named_buffers(remove_duplicate=False))
        return _Weights({name: held[name] for name in self._plan.read if name != without})

    @property
    def blocks(self) -> list[str]:
        """The paths of the model's blocks, before and after the cut, in the order of their first call."""
        return self._plan.blocks

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that are called before the cut, in the order of their first call, with their paths."""
        modules = dict(self.model.named_modules())
        return [(path, modules[path]) for path in self._plan.before]

    def collect(self, observation: Observation, batch: int) -> State:
        """Return the state of `batch` samples from a filled observation, or raise SplitError if it lacks a tensor."""
        for slot in self.slots:
            if slot.source not in observation.values:
                raise SplitError(
                    f"state {slot.name!r} is not made with these inputs; give the prefix inputs like the example's"
                )
        return {slot.name: slot.layout.to_state(observation.values[slot.source], batch) for slot in self.slots}


class _Weights(Mapping[str, Tensor]):
    """Tensors of a model by name, read when they are looked up."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self._held = held

    def __getitem__(self, name: str) -> Tensor:
        return value_of(self._held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Capture:
    """A function that runs the common model of several prefixes once and returns their states."""

    def __init__(self, prefixes: Sequence[Prefix]) -> None:
        """Prepare to run `prefixes`, or raise SplitError: there is none, or they belong to different models."""
        if not prefixes or any(prefix.model is not prefixes[0].model for prefix in prefixes):
            raise SplitError(
                "capture takes one or more prefixes of one and the same model object; split that object for each cut"
            )
        self.prefixes = tuple(prefixes)
        self._elapsed: list[Callable[[], float]] = []

    @property
    def elapsed(self) -> list[float]:
        """Seconds from the start of the last call to each cut, in the order of the prefixes; waits for the device."""
        return [seconds() for seconds in self._elapsed]

    def __call__(self, *args: Any, **inputs: Any) -> list[State]:
        """Return the state of a batch at each cut, in the order of the prefixes; raises as a Prefix does."""
        observations = [Observation(one.cut, [slot.source for slot in one.slots]) for one in self.prefixes]
        args, inputs = self.prefixes[0].inputs.for_prefix(args, inputs)
        observe(self.prefixes[0].model, observations, args, inputs)
        self._elapsed = [observation.elapsed for observation in observations]
        batch = batch_size(args, inputs)
        return [prefix.collect(one, batch) for prefix, one in zip(self.prefixes, observations, strict=True)]
