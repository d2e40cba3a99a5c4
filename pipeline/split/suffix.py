"""The trainable part of a split: takes the state and runs the rest of the model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.cut import TensorSource
from pipeline.split.forward import eval_mode, value_of
from pipeline.split.frozen import FrozenParameters, dummy
from pipeline.split.inputs import TensorSpec
from pipeline.split.phantom_run import install_fake_forwards
from pipeline.split.plan import SplitPlan
from pipeline.split.prefix import Slot, State
from pipeline.split.replay import Replay
from pipeline.split.splittable import copy_of
from pipeline.split.tree import Args, Kwargs


class Suffix(nn.Module):
    """The layers after the cut, as a function from state and inputs to the model's own output.

    The suffix adopts the children of a copy of the model, so every name in `named_parameters()` and `state_dict()` is
    the full model's own, and only what trains has one.

    Attributes:
        cut: where the model is cut.
        spec: dtype and shape of each tensor of the state.
        root: the copy of the model whose children these are; its `forward` is what runs.
        replay: how `root` gets to the cut.
        accepts_loss_kwargs: whether the model's `forward` takes further keywords, as the Trainer of transformers asks:
            then it leaves the scale of a loss over accumulated batches to the model.
        loss_type: the kind of the model's loss, as transformers names it, which the Trainer asks too; None of others.
    """

    root: nn.Module

    def __init__(
        self,
        model: nn.Module,
        plan: SplitPlan,
        slots: Sequence[Slot],
        constants: Mapping[TensorSource, Tensor],
        *,
        share: bool = False,
    ) -> None:
        """Use `split`, which finds the arguments and proves them; with `share`, trainable parameters are not copied."""
        super().__init__()
        self.plan, self.cut = plan, plan.cut
        self.spec: Mapping[str, TensorSpec] = {slot.name: slot.spec for slot in slots}
        self.slots = tuple(slots)
        root, self.frozen = trainable_copy(model, plan, share=share)
        self.__dict__["root"] = root  # not a child: its children are adopted, under their own names
        self.replay = Replay(root, self.cut, self.frozen, plan.inputs)
        self._modules, self._parameters, self._buffers = root._modules, root._parameters, root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self._dtypes = {slot.name: slot.spec.dtype for slot in slots}
        self._constants = dict(constants)
        self._written = frozenset(plan.written)
        self.accepts_loss_kwargs, self.loss_type = plan.inputs.is_open, getattr(model, "loss_type", None)
        self._recycled = [root.get_submodule(path) for path in set(plan.before) - plan.after]
        self.register_load_state_dict_post_hook(_forgive_frozen_counts)  # type: ignore[no-untyped-call]
        self.train(model.training)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def forward(self, state: State, *args: Any, **inputs: Any) -> Any:
        """Return the model's output for a batch, given its state (each tensor (B, ...)) and the model's inputs.

        Batches may have any size, length and padding that the model takes. `torch.compile` compiles the model's own
        `forward`, from the cut on, as one graph. State tensors that require grad go on doing so, as reentrant gradient
        checkpointing needs it.

        Floating-point inputs that the prefix reads may be left out where they have the example's shape, or be expanded
        placeholders: their values are never read here, those that matter are part of the state. State tensors take the
        dtype that the model had there. Named tensors and lists that the model does not take are ignored, so that a
        batch may have fields for others.

        Raises:
            InputRefusedError: the model's own code fails on these inputs before the cut.
            SplitError: the state lacks a tensor or does not fit the inputs, or these inputs lead to the cut in a way
                that cannot be replayed.
        """
        args, inputs = self.plan.inputs.for_suffix(args, inputs, state)
        args, inputs = self.replay.begin(self._values(state), args, inputs)
        return self.replay.run(args, inputs)

    def record(self, state: State, *args: Any, **inputs: Any) -> None:
        """Prepare for batches of this kind, so that `forward` takes them under `torch.func.vmap`; raises as it does."""
        args, inputs = self.plan.inputs.for_suffix(args, inputs, state)
        self.replay.record(self._values(state), args, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _values(self, state: State) -> dict[TensorSource, Tensor]:
        """Return the tensors that the model meets at the cut, as it has them; copies where it writes into them."""
        if state.keys() != self.spec.keys():
            raise SplitError(f"the state holds {sorted(state)}, the suffix at {self.cut} takes {sorted(self.spec)}")
        values: dict[TensorSource, Tensor] = dict(self._constants)
        for slot in self.slots:
            values[slot.source] = slot.layout.from_state(state[slot.name].to(self._dtypes[slot.name]))
        if written := self._written & values.keys():  # only then: tensors under vmap have no address
            stored = {tensor.untyped_storage().data_ptr() for tensor in [*state.values(), *self._constants.values()]}
            for source in written:
                if values[source].untyped_storage().data_ptr() in stored:
                    values[source] = values[source].clone()
        return values

    @property
    def constants(self) -> Mapping[TensorSource, Tensor]:
        """The values that cross the cut and belong to no sample, by where the model has them.

        They are results of the weights before the cut.
        """
        return self._constants

    def train(self, mode: bool = True) -> Self:
        """Set training mode; modules that run only before the cut stay in eval mode."""
        super().train(mode)
        self.root.training = mode
        for module in self._recycled:
            module.training = False
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise SplitError("nn.DataParallel cannot replicate a suffix; use nn.parallel.DistributedDataParallel")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frozen.move(fn)
        self.replay.forget()
        self._constants = {source: fn(value) for source, value in self._constants.items()}
        self._dtypes = {name: fn(torch.empty(0, dtype=dtype)).dtype for name, dtype in self._dtypes.items()}
        return self


def output_in_eval(suffix: Suffix, state: State, args: Args, kwargs: Kwargs) -> Any:
    """Return the output of `suffix` in eval mode, without gradients; the flag of every module is restored."""
    with torch.no_grad(), eval_mode(suffix), eval_mode(suffix.root):
        return suffix(state, *args, **kwargs)


def trainable_copy(model: nn.Module, plan: SplitPlan, *, share: bool = False) -> tuple[nn.Module, FrozenParameters]:
    """Return a copy of `model` that holds only what trains after the cut, and its frozen parameters, set aside.

    Parameters that train are copied, unless both `share` them, and so are all buffers; those of modules that only the
    prefix runs are left out of the state dict.
    """
    weights = {name: item for name, item in model.named_parameters() if name in set(plan.frozen.values())}
    memo: dict[int, Any] = {id(item): item for item in model.parameters()} if share else {}
    for item in weights.values():  # those on the meta device were not loaded; the suffix is on the CPU
        memo[id(item)] = dummy(item, device="cpu" if item.is_meta else None)
    root = copy_of(model, memo)
    install_fake_forwards(root, plan.fake_forwards)
    frozen = FrozenParameters(root, plan.frozen, {name: value_of(weights[name]).clone() for name in plan.kept})
    for path, module in root.named_modules():
        if path not in plan.after:
            called = path in plan.before
            read = {name for name in module._buffers if called or f"{path}.{name}".lstrip(".") in plan.read}
            module._non_persistent_buffers_set |= read
    return root, frozen


def _forgive_frozen_counts(suffix: nn.Module, incompatible: Any) -> None:
    """Ignore the batch counts that frozen batch norms add to a state dict without a version, and torch then reports."""
    frozen = set(dict(suffix.named_buffers())) - set(suffix.state_dict())
    counts = tuple(name for name in frozen if name.endswith("num_batches_tracked"))
    incompatible.unexpected_keys[:] = [key for key in incompatible.unexpected_keys if not key.endswith(counts)]
