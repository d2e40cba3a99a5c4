"""Splitting a model, and writing a trained suffix back into it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.errors import SplitError
from pipeline.split.acceptance import ReferenceRun, accept, warn_about_padding, warn_about_shared_layers
from pipeline.split.blocks import find_blocks, resolve
from pipeline.split.cut import TensorSource, state_names
from pipeline.split.forward import trace
from pipeline.split.layout import batch_size, prove_layout, regroup, two_samples
from pipeline.split.observation import Observation, observe
from pipeline.split.plan import Planned, make_plan
from pipeline.split.prefix import Prefix, Slot, TensorSpec
from pipeline.split.splittable import check_model
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs, as_call, difference, mismatch, tolerance


def split(model: nn.Module, at: float | str, example: Any) -> tuple[Prefix, Suffix]:
    """Cut `model` in two: `suffix(prefix(x), x)` equals `model(x)`, in eval and train mode, gradients too.

    Args:
        model: any module; it is left unchanged. The suffix holds copies of the weights it trains.
        at: a share of the blocks (0: full fine-tuning from the inputs, 1: head only), a whole number of blocks from 2
            on (1 is the share: name the second block's path to recycle one), a module path, or `path#2` for the third
            call of a module. `candidates` lists the places, each under its share, number and path.
        example: a batch of at least 2 samples: a mapping (called as `model(**example)`), a tuple, or one tensor. Of a
            larger one, two samples are used.

    Raises:
        InputRefusedError: the model's own code fails on the example.
        NoSuchCutError: `at` names no place in the model.
        SplitError: the model cannot be split exactly there; the message names the reason.
    """
    check_model(model)
    args, kwargs = read_example(example)
    seen = trace(model, args, kwargs)
    cut = resolve(model, at, seen.calls, find_blocks(model, seen.calls))
    planned = make_plan(model, cut, seen, args, kwargs)
    second = regroup(args, kwargs)
    slots, constants, observation, output = prove_state(model, planned, seen.output, (args, kwargs), second)
    prefix = Prefix(model, planned.plan, slots)
    suffix = Suffix(model, planned.plan, slots, constants)
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
    trained = suffix.state_dict()
    own = model.state_dict()
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
    observe(model, [again], *first)
    other_output = observe(model, [other], *second[:2], to_the_end=True)
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
