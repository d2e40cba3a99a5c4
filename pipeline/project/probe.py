"""The probe of a store: inputs and states of fixed contents, kept when the store was created.

The recipe identifies by digests what decides a state; the probe shows the states themselves. Before a prefix runs for a
store, its probe is compared: ids exactly, floating-point values within the rounding of another machine. So changes that
no digest covers (the code of a library, a value read at run time) are found before states of two networks are mixed.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.encode.config import EncodeConfig
from pipeline.encode.encoder import compute_format
from pipeline.encode.ragged import Sample
from pipeline.errors import BadSampleError, StaleStoreError
from pipeline.keys import JSON
from pipeline.models import Preprocess, network_inputs
from pipeline.split import Capture, Prefix, run_together
from pipeline.store import PROBE, Store, read_attachment, write_attachment

FILE = "probe.safetensors"
RUN_ON = 2
"""Number of contents whose states are kept; of the others only the inputs, which need no forward pass."""
INPUT_TOLERANCE = 0.02
"""Largest relative difference of a floating-point input, for libraries of other versions that resize differently."""
STATE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""The same for a state, by the type that the prefix computes in."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """Fixed contents as inputs of a network: n samples, without a batch axis."""

    inputs: Sequence[Sample]
    is_drawn: bool
    """True if the inputs were drawn at random because the kind of content is unknown."""

    @classmethod
    def of(cls, preprocess: Preprocess, like: Sequence[Sample]) -> "Probe":
        """Preprocess the fixed contents, or draw inputs of the shapes, types and ranges of those of samples `like`."""
        samples = []
        for content in preprocess.probe_contents():
            with suppress(BadSampleError):  # a text that has no token here
                samples.append(preprocess(content))
        return cls(samples or [_drawn(sample) for sample in like], not samples)


def write_probe(store: Store, probe: Probe, states: Sequence[Tensors]) -> None:
    """Write the `probe` into `store`, with the states of its first samples."""
    tensors = {f"{i}.input.{name}": tensor for i, sample in enumerate(probe.inputs) for name, tensor in sample.items()}
    tensors |= {f"{i}.state.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}
    about: dict[str, JSON] = {"recipe": store.recipe.digest, "samples": len(probe.inputs), "drawn": probe.is_drawn}
    kept = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_attachment(store, PROBE, about, lambda folder: save_file(kept, folder / FILE))


def read_probe(store: Store) -> tuple[Probe, list[Tensors]] | None:
    """Return the probe of a store with its states; None where it has none.

    Raises:
        CorruptStoreError: it is damaged.
    """
    found = read_attachment(store, PROBE)
    if found is None or found[1].get("recipe") != store.recipe.digest:
        return None
    folder, about = found
    tensors = load_file(folder / FILE)
    numbers = range(int(about["samples"]))
    states = [_of(tensors, f"{i}.state.") for i in numbers]
    return Probe([_of(tensors, f"{i}.input.") for i in numbers], bool(about["drawn"])), [one for one in states if one]


def run_probe(prefixes: Sequence[Prefix], probe: Probe, config: EncodeConfig) -> list[list[Tensors]]:
    """Return the states of the first samples of `probe` at each cut: `states[cut][sample]`, with a batch axis of 1.

    A network may refuse inputs that were drawn: then there are no states.
    """
    form, found = compute_format(prefixes, config), list[list[Tensors]]([] for _ in prefixes)
    batches = (
        {name: tensor.unsqueeze(0) for name, tensor in network_inputs(sample).items()}
        for sample in probe.inputs[:RUN_ON]
    )
    runs = [partial(form.run, Capture(prefixes), batch) for batch in batches]
    try:
        states_of_samples = run_together(prefixes[0].model, runs)
    except Exception:  # the network's own code: it refuses in as many ways as there are networks
        if probe.is_drawn:
            return [[] for _ in prefixes]
        raise
    for states in states_of_samples:
        for of_cut, state in zip(found, states, strict=True):
            of_cut.append(
                {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
            )
    return found


def keep_or_check_probes(
    stores: Sequence[Store],
    prefixes: Sequence[Prefix],
    preprocess: Preprocess,
    like: Sequence[Sample],
    config: EncodeConfig,
) -> None:
    """Compare the stores of one view, one per cut, with their probes; write a probe for new stores.

    A store that has samples but no probe gets none: its samples may come from other code.

    Raises:
        StaleStoreError: preprocessing or prefix give other values now; the message names the first difference.
    """
    new: list[tuple[Store, Prefix]] = []
    for store, prefix in zip(stores, prefixes, strict=True):
        if (known := read_probe(store)) is not None:
            check_probe(store, prefix, preprocess, config, known)
        elif not len(store.keys()):
            new.append((store, prefix))
    if new:
        probe = Probe.of(preprocess, like)
        for (store, _), states in zip(new, run_probe([prefix for _, prefix in new], probe, config), strict=True):
            write_probe(store, probe, states)


def check_probe(
    store: Store,
    prefix: Prefix,
    preprocess: Preprocess,
    config: EncodeConfig,
    known: tuple[Probe, list[Tensors]] | None = None,
) -> None:
    """Compare `preprocess` and `prefix` with the probe of `store`, if it has one.

    Raises:
        StaleStoreError: they give other values now; the message names the first difference.
    """
    known = known or read_probe(store)
    if known is None:
        return
    probe, states = known
    if not probe.is_drawn:
        today = Probe.of(preprocess, []).inputs
        for sample, again in itertools.zip_longest(probe.inputs, today, fillvalue=Tensors()):
            _compare(store, "the preprocessing", sample, again, INPUT_TOLERANCE)
    (found,) = run_probe([prefix], probe, config)
    for state, again in zip(states, found, strict=False):
        _compare(store, "the network before the cut", state, again, STATE_TOLERANCE[store.recipe.compute_dtype])


def _compare(store: Store, what: str, then: Mapping[str, Tensor], now: Mapping[str, Tensor], tolerance: float) -> None:
    fault = _first_difference(then, now, tolerance)
    if fault is not None:
        raise StaleStoreError(
            f"{store.where}: for the same fixed input {what} gives other values than when the store was encoded "
            f"({fault}), though the recipe is the same: code of a library or of your own has changed in a way that the "
            "recipe does not cover. Use the earlier version of that code, or encode again (recycle encode --replace)"
        )


def _first_difference(then: Mapping[str, Tensor], now: Mapping[str, Tensor], tolerance: float) -> str | None:
    for name in sorted({*then, *now}):
        if name not in then or name not in now or then[name].shape != now[name].shape:
            shapes = [tuple(of[name].shape) if name in of else "absent" for of in (then, now)]
            return f"{name} was {shapes[0]}, is {shapes[1]}"
        before, today = then[name], now[name].cpu()
        if not before.is_floating_point():
            if not torch.equal(before, today):
                place = torch.nonzero(before != today)[0].tolist()
                return f"{name}{place} was {before[*place].item()}, is {today[*place].item()}"
            continue
        before, today = before.float().nan_to_num(), today.float().nan_to_num()
        gap = float((before - today).abs().max() / before.abs().max().clamp(min=1e-12)) if before.numel() else 0.0
        if gap > tolerance:
            return f"{name} differs by {gap:.1e} of its largest value; other machines differ by at most {tolerance}"
    return None


def _of(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _drawn(like: Sample) -> Sample:
    """Draw a sample with the shapes and types of another one; integers are from the same range."""
    draw = torch.Generator().manual_seed(0)
    drawn = {}
    for name, tensor in like.items():
        if tensor.is_floating_point():
            drawn[name] = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        else:
            low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
            drawn[name] = torch.randint(low, high + 1, tensor.shape, generator=draw).to(tensor.dtype)
    return drawn
