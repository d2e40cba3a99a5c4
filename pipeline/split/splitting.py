"""Splitting a model: the flow, the proof that the suffix does what the full model does, warnings; and merging."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.blocks import find_blocks, resolve
from pipeline.split.cut import TensorSource, state_names
from pipeline.split.forward import OUT_OF_MEMORY, state_kept, trace
from pipeline.split.inputs import TensorSpec
from pipeline.split.layout import batch_size, prove_layout, regroup, sample_tolerance, two_samples
from pipeline.split.observation import Observation, observe, run_in_training, seeded_calls
from pipeline.split.plan import Planned, SplitPlan, make_plan
from pipeline.split.prefix import Prefix, Slot, State
from pipeline.split.sections import run_together
from pipeline.split.splittable import check_model
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs, as_call, difference, map_arguments, mismatch, tolerance


def split(
    model: nn.Module, at: float | str, example: Any, *, values: bool = False, share: bool = False
) -> tuple[Prefix, Suffix]:
    """Cut `model` in two: `suffix(prefix(x), x)` equals `model(x)`, in eval and train mode, gradients too.

    Args:
        model: any module; it is left unchanged. The suffix holds copies of the weights it trains.
        at: a share of the blocks (0: full fine-tuning from the inputs, 1: head only), a whole number of blocks from 2
            on (1 is the share: name the second block's path to recycle one), a module path, or `path#2` for the third
            call of a module. `candidates` lists the places, each under its share, number and path.
        example: a batch of at least 2 samples: a mapping (called as `model(**example)`), a tuple, or one tensor. Of a
            larger one, two samples are used.
        values: the suffix will be given the values of all inputs that no layer before the cut reads, such as labels in
            floating point, so that the state need not hold them.
        share: whether the suffix has the model's own weights instead of copies, for a look at it alone.

    Raises:
        InputRefusedError: the model's own code fails on the example.
        NoSuchCutError: `at` names no place in the model.
        SplitError: the model cannot be split exactly there; the message names the reason.
    """
    check_model(model)
    args, kwargs = read_example(example)
    seen = trace(model, args, kwargs)
    blocks = find_blocks(model, seen.calls)
    cut = resolve(model, at, seen.calls, blocks)
    planned = make_plan(model, cut, seen, args, kwargs, values=values)
    planned.plan.blocks += dict.fromkeys(block.path for block in blocks)
    second = regroup(args, kwargs)
    slots, constants, observation, output = prove_state(model, planned, seen.output, (args, kwargs), second)
    prefix = Prefix(model, planned.plan, slots)
    suffix = Suffix(model, planned.plan, slots, constants, share=share)
    warn_about_shared_layers(model, planned.plan)
    warn_about_padding(model, planned, slots, args, kwargs)
    runs = [
        ReferenceRun(args, kwargs, prefix.collect(planned.observation, 2), seen.output),
        ReferenceRun(second[0], second[1], prefix.collect(observation, 3), output),
    ]
    accept(suffix, model, planned.plan, runs)
    return prefix, suffix


def read_example(example: Any) -> tuple[Args, Kwargs]:
    """Return the arguments with which `example` calls a model, on two of its samples."""
    args, kwargs = as_call(example)
    if batch_size(args, kwargs) < 2:
        raise SplitError("the example holds 1 sample; give a batch of at least 2, so that the batch axis shows")
    return two_samples(args, kwargs)


def merge(model: nn.Module, suffix: Suffix) -> nn.Module:
    """Write the trained weights and buffers of `suffix` into `model`, and return it.

    Raises:
        SplitError: `model` is not of the architecture that was split, or has no memory for the weights.
    """
    check_model(model)
    trained, own = suffix.state_dict(), model.state_dict()
    wrong = [name for name, item in trained.items() if name not in own or own[name].shape != item.shape]
    if wrong:
        raise SplitError(
            f"the suffix's {wrong[0]!r} does not fit the model; merge into the architecture that was split"
        )
    model.load_state_dict(trained, strict=False)
    return model


def prove_state(
    model: nn.Module,
    planned: Planned,
    output: Any,
    first: tuple[Args, Kwargs],
    second: tuple[Args, Kwargs, Tensor],
) -> tuple[list[Slot], dict[TensorSource, Tensor], Observation, Any]:
    """Prove that the planned state gives the model's `output` on the first batch, and by a second one its layout.

    Returns the tensors of the state with their proved layouts, the constants that belong to no sample, and of the
    second batch, what the model had at the cut and what it returned. Where a value has no provable batch axis, or two
    runs on one batch differ, SplitError says so.
    """
    plan = planned.plan
    again, other = Observation(plan.cut, plan.sources), Observation(plan.cut, plan.sources)
    _, other_output = run_together(
        model,
        [
            partial(observe, model, [again], *first),
            partial(observe, model, [other], *second[:2], to_the_end=True),
        ],
    )
    slots, constants = [], {}
    for source, name in state_names(model, model.get_submodule(plan.cut.path), plan.sources).items():
        value = planned.observation.values[source]
        if difference(value, again.values[source]) > tolerance(value.dtype):  # what is stored would be one draw of many
            raise SplitError(
                f"the prefix is random in eval mode: state {name!r} differs between two runs on the same batch"
            )
        layout = prove_layout(name, value, other.values[source], second[2])
        if layout is None:
            constants[source] = value.clone()
        else:
            shape = tuple(layout.to_state(value, batch_size(*first)).shape[1:])
            slots.append(Slot(name, source, layout, TensorSpec(value.dtype, shape)))
    if reason := mismatch(output, planned.output):
        raise SplitError(
            f"split at {plan.cut}: {reason} in eval mode; the model is random there, or cannot be cut here"
        )
    return slots, constants, other, other_output


LEFT = " on the left; pad on the right (tokenizer.padding_side), or give position_ids that count from the first token"
ALWAYS = "; pad every batch to one fixed length"


@dataclass(frozen=True)
class ReferenceRun:
    """A batch with its state, and what the full model returns for it.

    Attributes:
        buffers: the buffers that the full model leaves after the run, as far as they are compared.
        training: whether the full model ran in train mode from the cut on.
    """

    args: Args
    kwargs: Kwargs
    state: State
    output: Any
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    training: bool = False


def accept(suffix: Suffix, model: nn.Module, plan: SplitPlan, runs: Sequence[ReferenceRun]) -> None:
    """Find the kind of replay with which `suffix` does what `model` does.

    It must return what the full model returned in each of the `runs` in eval mode and in a further one in train mode,
    where it must also leave the same buffers (running statistics). Stored tensors must be left as they are. The kinds
    of replay are tried from the cheapest to the most general.

    Raises:
        SplitError: none does; the message says what differs.
    """
    first, training = runs[0], suffix.training
    output, buffers = run_in_training(model, plan.cut, first.args, first.kwargs)
    frozen = tuple(f"{path}." for path in set(plan.before) - plan.after)
    buffers = {name: item for name, item in buffers.items() if not name.startswith(frozen)}
    runs = [*runs, ReferenceRun(first.args, first.kwargs, first.state, output, buffers, training=True)]
    replay = suffix.replay
    for replay.fills, replay.dense in itertools.product((False, True), repeat=2):
        replay.forget()
        reason = next((found for run in runs if (found := _deviation(suffix, run))), None)
        suffix.train(training)
        if reason is None:
            return
    raise SplitError(
        f"split at {suffix.cut}: the suffix does not reproduce the full model: {reason}; the model's code before the "
        "cut depends on values or objects of recycled layers, so cut elsewhere, or give other options"
    )


def _deviation(suffix: Suffix, run: ReferenceRun) -> str | None:
    """Return how the suffix differs from the full model, or None."""
    stored = {name: tensor.clone() for name, tensor in run.state.items()}
    stored |= {str(source): tensor for source, tensor in suffix.constants.items()}
    before = {name: tensor.clone() for name, tensor in stored.items()}
    with_gradients = run.training and torch.is_grad_enabled()
    suffix.train(run.training)
    try:
        with state_kept(suffix.root), seeded_calls(suffix.root, suffix.cut), torch.set_grad_enabled(with_gradients):
            output = suffix({name: stored[name] for name in run.state}, *run.args, **run.kwargs)
            reason = mismatch(run.output, output)
            left = dict(suffix.root.named_buffers())
            changed = [name for name, item in run.buffers.items() if mismatch(item, left.get(name))]
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # the model's own code meets dummies, and may raise anything
        return f"{type(error).__name__}: {error}"
    if not reason and changed:
        reason = f"buffer {changed[0]!r} differs from the full model's"
    if not reason and any(not torch.equal(tensor, before[name]) for name, tensor in stored.items()):
        reason = "a stored tensor is written to"
    return f"{reason} in {'train' if run.training else 'eval'} mode" if reason else None


def warn_about_shared_layers(model: nn.Module, plan: SplitPlan) -> None:
    """Warn when layers after the cut do not train, because the prefix runs the same layers (ALBERT)."""
    calls_again = set(plan.before) & plan.after
    shared = [name for name in plan.kept if name.rpartition(".")[0] in calls_again]
    if shared:
        size = sum(model.get_parameter(name).numel() for name in shared)
        rest = sum(item.numel() for name, item in model.named_parameters() if name not in plan.frozen)
        warnings.warn(
            f"split at {plan.cut}: the prefix and the suffix share layers ({shared[0]!r} and others, {size:,} "
            f"parameters); shared layers do not train, only the {rest:,} parameters of the rest of the suffix do",
            stacklevel=3,
        )


def warn_about_padding(model: nn.Module, planned: Planned, slots: Sequence[Slot], args: Args, kwargs: Kwargs) -> None:
    """Warn when the state of a padded sample changes with its padding.

    A state is stored without padding and meets other samples later, padded to another length. A network may mix the
    padding in (FNet, XLNet), or number positions from the left edge of the batch, which padding on the left moves
    (BERT). The shortest sample of the example is run again without its padding; without a padded sample there is no
    check.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    row = int(mask.sum(1).argmin())
    places = mask[row].nonzero().flatten()
    length, padded = len(places), mask.shape[1]
    if length in (0, padded) or int(places[-1] - places[0]) != length - 1:
        return
    start, batch = int(places[0]), batch_size(args, kwargs)

    def trim(_: str, item: Tensor) -> Tensor:
        item = item[[row] * batch] if item.dim() and item.shape[0] == batch else item
        return item[:, start : start + length] if item.shape[:2] == mask.shape else item

    plan, padded_run = planned.plan, planned.observation
    trimmed_run = Observation(plan.cut, plan.sources)
    observe(model, [trimmed_run], *map_arguments(trim, args, kwargs))
    for slot in slots:
        ours = slot.layout.to_state(padded_run.values[slot.source], batch)[row]
        theirs = slot.layout.to_state(trimmed_run.values[slot.source], batch)[0]
        if ours.dim() == 0 or ours.shape[0] != padded:
            continue
        if difference(ours[start : start + length], theirs) > sample_tolerance(ours.dtype):
            warnings.warn(
                f"split at {plan.cut}: state {slot.name!r} of a sample depends on how far it is padded"
                f"{LEFT if start else ALWAYS}, or what is recycled differs from what the full model computes",
                stacklevel=3,
            )
