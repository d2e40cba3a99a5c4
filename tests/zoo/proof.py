"""The proof that a split is exact: the suffix against the full model with a frozen prefix, in all a user relies on."""

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encode.ragged import Sample, find_trimming, pad_batch
from pipeline.errors import ModelError, SplitError
from pipeline.split import Prefix, Suffix, merge, split
from pipeline.split.tree import as_call, difference, map_tensors, tensors

OUTPUT = 1e-6
GRADIENT = 1e-5
ROUNDING = 1e-7
"""Of the largest gradient: what fp32 leaves of gradients that are zero, such as those of a bias before a softmax."""
RAGGED = 1e-5
SEED = 11
MASK = "attention_mask"

Example = Callable[[int], Any]
"""Batch size -> a batch, as `split` takes it."""


class InexactError(Exception):
    """The suffix does something else than the full model."""


@dataclass
class Proof:
    """What was found at one cut."""

    at: float | str
    status: str
    """"exact", "refused" (`split` or the head said no), "wrong" (no, it is not exact), or "failed" (anything else)."""
    cut: str = ""
    reason: str = ""
    ragged: str = ""
    """"equal", or why the comparison in another padding does not apply."""
    double: bool = False
    """Whether gradients were compared in float64, as they were not equal in float32."""
    state_bytes: int = 0
    """Bytes of a sample's state in 16 bits per number."""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


def prove(make: Callable[[], nn.Module], example: Example, at: float | str) -> Proof:
    """Split the model of `make` at `at`, and compare with the full model; nothing is raised."""
    start = time.perf_counter()
    proof = Proof(at, "exact")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(SEED)
            model = make()
            add_noise_to_constants(model)
            prefix, suffix = split(model, at, example(2))
            proof.cut = str(prefix.cut)
            proof.state_bytes = sum(2 * torch.Size(spec.shape).numel() for spec in prefix.spec.values())
            for size in (2, 3):
                prove_outputs(model, prefix, suffix, example(size))
            try:
                prove_training(model, prefix, suffix, example(2))
            except InexactError:  # gradients that are sums of nearly nothing are rounding, in float32
                proof.double = True
                double = copy.deepcopy(model).double()
                prove_training(double, *split(double, at, in_double(example(2))), in_double(example(2)))
                del double
            prove_merge(model, prefix, suffix, example(2))
            proof.ragged = prove_ragged(model, prefix, suffix, example(3))
        except (SplitError, ModelError) as error:
            proof.status, proof.reason = "refused", str(error)
        except InexactError as error:
            proof.status, proof.reason = "wrong", str(error)
        except Exception as error:
            proof.status, proof.reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    proof.warnings = [str(one.message) for one in told if "split at" in str(one.message)]
    proof.seconds = time.perf_counter() - start
    return proof


def add_noise_to_constants(model: nn.Module) -> None:
    """Let every weight matter: a layer scale of 1e-6 or a norm of zeros would hide from us what it multiplies."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.numel() > 1 and weight.amin() == weight.amax():
                weight.add_(torch.randn_like(weight), alpha=0.1)


def prove_outputs(model: nn.Module, prefix: Prefix, suffix: Suffix, example: Any) -> None:
    """Compare all outputs in eval mode."""
    model.eval()
    suffix.eval()
    with torch.no_grad():
        expected, found = call(model, example), recycle(prefix, suffix, example)
    for name, tensor in tensors(expected).items():
        if tensor.is_floating_point() and not (tensor.isfinite().any() and tensor.any()):
            raise ValueError(
                f"the model's output {name!r} is {tensor.flatten()[:3].tolist()}: equal ones prove nothing"
            )
    if type(found) is not type(expected):
        raise InexactError(f"the output is a {type(found).__name__}, the model's a {type(expected).__name__}")
    assert_same("outputs in eval mode", expected, found, OUTPUT)


def prove_training(model: nn.Module, prefix: Prefix, suffix: Suffix, example: Any) -> None:
    """Compare gradients and running statistics in both modes."""
    for training in (False, True):
        prove_gradients(model, prefix, suffix, example, training=training)


def in_double(example: Any) -> Any:
    """Return a batch with its floating-point tensors in float64."""
    return map_tensors(lambda _, item: item.double() if item.is_floating_point() else item, example)


def prove_gradients(model: nn.Module, prefix: Prefix, suffix: Suffix, example: Any, *, training: bool) -> None:
    """Compare gradients and running statistics after one step, with the same random numbers drawn after the cut."""
    mode = "train" if training else "eval"
    full = reference(model, prefix, training)
    torch.manual_seed(SEED)
    loss(call(full, example)).backward()
    expected, buffers = gradients(full), dict(full.named_buffers())
    del full  # large models fit into memory few times
    suffix = copy.deepcopy(suffix).train(training)
    loss(recycle(prefix, suffix, example, SEED)).backward()
    noise = ROUNDING * max((float(gradient.abs().amax()) for gradient in expected.values()), default=0.0)
    assert_same(f"gradients in {mode} mode", expected, gradients(suffix), GRADIENT, noise)
    trained = {name: item for name, item in suffix.state_dict().items() if name in buffers}
    assert_same(f"buffers in {mode} mode", {name: buffers[name] for name in trained}, trained, OUTPUT)


def prove_merge(model: nn.Module, prefix: Prefix, suffix: Suffix, example: Any) -> None:
    """Train one step, save and load the weights, write them into the full model, and compare."""
    trained = copy.deepcopy(suffix).train()
    optimizer = torch.optim.SGD([{"params": list(trained.parameters())}], lr=1e-3)
    loss(recycle(prefix, trained, example, SEED)).backward()
    torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    reloaded = copy.deepcopy(suffix)
    reloaded.load_state_dict(trained.state_dict())
    merged = merge(copy.deepcopy(model), reloaded).eval()
    with torch.no_grad():
        found = recycle(prefix, trained.eval(), example)
        assert_same("outputs of the merged model", call(merged, example), found, OUTPUT)
        assert_same("outputs of reloaded weights", recycle(prefix, reloaded.eval(), example), found, OUTPUT)


def prove_ragged(model: nn.Module, prefix: Prefix, suffix: Suffix, example: Any) -> str:
    """Compare on the shorter samples of a padded batch, which met longer ones when their states were made."""
    if not isinstance(example, Mapping) or not isinstance(mask := example.get(MASK), Tensor) or mask.dim() != 2:
        return "no mask"
    lengths = mask.sum(1).tolist()
    longest = max(lengths)
    if longest != mask.shape[1] or min(lengths) == longest:
        return "not padded"
    samples = [_sample(example, mask, row, length) for row, length in enumerate(lengths)]
    trimming = find_trimming(prefix, samples, {})
    shorter = [row for row, length in enumerate(lengths) if length < longest]
    batch = pad_batch([samples[row] for row in shorter], {})
    width = batch[MASK].shape[1]
    model.eval()
    suffix.eval()
    with torch.no_grad():
        before, expected = tensors(call(model, example)), tensors(call(model, batch))
        same = [
            _says_the_same(before, expected, row, place, lengths[row], mask.shape[1], width)
            for place, row in enumerate(shorter)
        ]
        if trimming.pads:
            states = trimming(prefix(**example), samples)
        else:
            single = [pad_batch([sample], {}) for sample in samples]
            alone = [prefix(**one) for one in single]
            states = {name: [state[name][0] for state in alone] for name in prefix.spec}
            same += [
                _says_the_same(tensors(call(model, single[row])), expected, 0, place, lengths[row], lengths[row], width)
                for place, row in enumerate(shorter)
            ]
        if not all(same):
            return "the model depends on padding"
        expected = {name: tensor for name, tensor in expected.items() if _is_alike(before[name], tensor, mask, width)}
        if not expected:
            return "no output is comparable"
        state = pad_batch([{name: values[row] for name, values in states.items()} for row in shorter], {})
        found = tensors(suffix(state, **batch))
    for name, tensor in expected.items():
        for place, row in enumerate(shorter):
            ours, theirs = (_valid(t, place, lengths[row], width) for t in (found[name], tensor))
            if ours is not None and theirs is not None and difference(theirs, ours) > RAGGED:
                raise InexactError(f"output {name!r} in another padding differs by {difference(theirs, ours):.1e}")
    return "equal" if trimming.pads else "equal, states made without padding"


def call(model: nn.Module, example: Any) -> Any:
    """Return the model's output on a batch."""
    args, kwargs = as_call(example)
    return model(*args, **kwargs)


def recycle(prefix: Prefix, suffix: Suffix, example: Any, seed: int | None = None) -> Any:
    """Run both halves; the seed is set between them, as the suffix's randomness is all there is."""
    args, kwargs = as_call(example)
    state = prefix(*args, **kwargs)
    if seed is not None:
        torch.manual_seed(seed)
    return suffix(state, *args, **kwargs)


def loss(output: Any) -> Tensor:
    """Return a scalar that depends on every output that has a gradient; there may be none."""
    squares = (tensor.float().square().mean() for tensor in tensors(output).values() if tensor.requires_grad)
    return sum(squares, start=torch.zeros((), requires_grad=True))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by the names of the parameters that have one, and an element."""
    return {name: item.grad for name, item in module.named_parameters() if item.grad is not None and item.numel()}


def reference(model: nn.Module, prefix: Prefix, training: bool) -> nn.Module:
    """The full model with a frozen prefix in eval mode: flags are the model's own from the cut on."""
    full = copy.deepcopy(model).train(training)
    frozen = prefix.weights().keys()
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    flags = [(module, module.training) for module in full.modules()]
    calls = iter(range(10_000))

    def enter(*_: Any) -> None:
        if next(calls) == prefix.cut.call:
            for module, flag in flags:
                module.training = flag
            hook.remove()

    full.eval()
    hook = full.get_submodule(prefix.cut.path).register_forward_pre_hook(enter)
    return full


def assert_same(what: str, expected: Any, found: Any, bound: float, noise: float = 0.0) -> None:
    """Raise unless both have the same tensors, equal to `bound` relative to the largest magnitude of each.

    Differences up to `noise` pass whatever they are relative to.
    """
    expected, found = tensors(expected), tensors(found)
    if expected.keys() != found.keys():
        missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise InexactError(f"{what}: missing {missing[:3]}, more {more[:3]}")
    for name, tensor in expected.items():
        other = found[name]
        if torch.equal(tensor, other):  # nearly always, and far quicker
            continue
        if noise and tensor.shape == other.shape and torch.allclose(other, tensor, rtol=0.0, atol=noise):
            continue
        if (gap := difference(tensor, other)) > bound:
            raise InexactError(f"{what}: {name or 'tensor'!r} differs by {gap:.1e} (bound {bound:.0e})")


def _sample(example: Mapping[str, Any], mask: Tensor, row: int, length: int) -> Sample:
    return {
        name: tensor[row][:length] if tensor.dim() >= 2 and tensor.shape[:2] == mask.shape else tensor[row]
        for name, tensor in example.items()
    }


def _says_the_same(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    row: int,
    place: int,
    length: int,
    padded_before: int,
    padded_after: int,
) -> bool:
    """Tell whether the full model says the same of one sample, `row` of a batch and `place` of another.

    Outputs that have another shape in another batch, such as similarities of all pairs, say nothing about it.
    """
    for name, tensor in after.items():
        old, new = _valid(before[name], row, length, padded_before), _valid(tensor, place, length, padded_after)
        if old is not None and new is not None and old.shape == new.shape and difference(old, new) > RAGGED:
            return False
    return True


def _is_alike(before: Tensor, after: Tensor, mask: Tensor, width: int) -> bool:
    """Tell whether an output is shaped by samples and their tokens alone: not by pairs, nor by tokens among others."""
    row, new = _valid(before, 0, 1, mask.shape[1]), _valid(after, 0, 1, width)
    return row is not None and new is not None and row.shape == new.shape


def _valid(tensor: Tensor, row: int, length: int, padded: int) -> Tensor | None:
    """Return what a padded output says of a sample's own tokens; None of outputs that are not per sample."""
    if tensor.dim() == 0 or row >= tensor.shape[0]:
        return None
    own = tensor[row]
    for axis, size in enumerate(own.shape):
        if size == padded and padded != length:
            own = own.narrow(axis, 0, length)
    return own
