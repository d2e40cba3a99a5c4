"""Settings of an encode tried on this machine: the rate of the bare prefix under each, and what each changes.

One setting is varied at a time, from the best of the others. The network is built and split once, at its deepest cut;
its weights are converted in place, and the prefix runs on one prepared batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.device import is_emulated
from pipeline.encode.ragged import length
from pipeline.keys import JSON
from pipeline.precision import ComputeFormat
from pipeline.project import Project
from pipeline.project.extrapolation import padded_positions
from pipeline.split import State
from pipeline.store import STATE_PREFIX
from pipeline.tasks import read_tensor
from pipeline.workflows.codec_error import compare_outputs, compare_states
from pipeline.workflows.trials.network import SECONDS_EACH, TrialNetwork, dtype_of

FASTER, BETTER_BATCH = 1.2, 1.1
"""Factors by which another precision, and another batch size, must be faster to be recommended."""
NEARLY = 0.85
"""Share of the speed of the fastest from which the most exact one is recommended."""
AS_FAST = 0.95
"""Share of the speed of the best batches from which those with the fewest changes are recommended."""
LARGEST_DEVIATION = 0.1
"""Largest mean deviation, of states and of outputs, of a precision that is recommended."""
COMPARED = 32
"""Samples whose states and outputs are compared."""
HELD_BYTES = 1 << 28
"""Bytes of the states of a segment up to which longer segments are recommended: an encode holds some at a time."""
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SettingTrial:
    """One trial; deviations are relative to float32 in the contiguous memory format, as in `CodecDeviation`."""

    settings: dict[str, Any]
    """Settings that replace those of params.yaml."""
    label: str
    samples_per_second: float
    state_mean: float | None = None
    output_mean: float | None = None
    changed: float | None = None
    padding: float | None = None
    """Share of padding in what the prefix computes; only of batches of samples of unequal length."""

    @property
    def is_close(self) -> bool:
        """True if states and outputs deviate by at most `LARGEST_DEVIATION` on average; False for NaN and for None."""
        return all(value is not None and value <= LARGEST_DEVIATION for value in (self.state_mean, self.output_mean))


@dataclass(frozen=True)
class SettingTrials:
    """All trials of a project, and the settings that they recommend with the reasons."""

    trials: list[SettingTrial] = field(default_factory=list)
    recommended: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    batches: list[SettingTrial] = field(default_factory=list)
    """Sizes of batches and segments under the settings recommended until then; the first are those of params.yaml."""
    rate: float | None = None
    """Samples per second of the deepest prefix under the settings as they are, and as they are recommended."""
    recommended_rate: float | None = None
    state_bytes: int = 0
    """Bytes of the states of a sample before the deepest cut, as they are computed, the mean of a batch."""


@dataclass
class Trials:
    """The trials of one project."""

    project: Project
    networks: Sequence[TrialNetwork]
    """One for each encoder."""
    deadline: float
    """Value of `time.monotonic` after which no trial begins."""
    found: list[SettingTrial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def exact(self) -> list[tuple[State, list[Tensor]]]:
        """States and outputs of a batch in float32 and the contiguous memory format, for each encoder."""
        states = [self._state(network, network.format("float32", channels_last=False)) for network in self.networks]
        return [(state, _outputs(network, state)) for network, state in zip(self.networks, states, strict=True)]

    def try_out(self, label: str, precision: str | None, *, channels_last: bool) -> SettingTrial | None:
        """Time all encoders, and compare states and outputs with the exact ones; None where the time is up."""
        if self.found and time.monotonic() > self.deadline:
            self.notes.append(f"{label}: not tried, the time was up")
            return None
        seconds, worst = 0.0, [0.0, 0.0, 0.0]
        for network, (exact, outputs) in zip(self.networks, self.exact, strict=True):
            form = network.format(precision, channels_last=channels_last)
            few = min(4, len(network.samples))
            fitting = int(SECONDS_EACH * few / network.seconds(form, few))
            count = max(1, min(len(network.samples), self.project.encode.batch_size, fitting))
            seconds += network.seconds(form, count) / count
            state = self._state(network, form)
            _, of_states = compare_states(_named(exact), _named(state))
            _, *of_outputs = compare_outputs(outputs, _outputs(network, state), network.loaded.head.kind)
            worst = [max(pair) for pair in zip(worst, (of_states, *of_outputs), strict=True)]
            label = _label(form)
        settings: dict[str, JSON] = {"encode.channels_last": channels_last}
        if channels_last == self.project.encode.channels_last:
            settings = {}
        if precision is not None:
            settings |= precision_settings(self.project, precision)
        self.found.append(SettingTrial(settings, label, len(self.networks) / seconds, worst[0], worst[1], worst[2]))
        return self.found[-1]

    def _state(self, network: TrialNetwork, form: ComputeFormat) -> State:
        batch = network.batch(min(COMPARED, len(network.samples)))
        return {name: item.float().cpu() for name, item in form.run(network.prefix, batch).items()}


def measure_settings(trials: Trials) -> SettingTrials:
    """Try memory format and precision, one after the other; return what was measured and is recommended."""
    encode, (network, *_) = trials.project.encode, trials.networks
    channels_last = encode.channels_last
    trials.try_out("the settings as they are", None, channels_last=channels_last)
    if any(item.dim() == 4 and item.is_floating_point() for item in network.batch(1).values()):
        other = trials.try_out("the other memory format", None, channels_last=not channels_last)
        if other is not None and other.samples_per_second > trials.found[0].samples_per_second:
            channels_last = not channels_last
    for precision in PRECISIONS:
        label = _label(ComputeFormat(network.device, dtype_of(precision), precision, channels_last))
        if is_emulated(precision, network.device):
            trials.notes.append(f"{label}: not tried, this processor lacks the instructions")
        elif label not in {trial.label for trial in trials.found}:
            trials.try_out(label, precision, channels_last=channels_last)
    return _recommended(trials)


def _recommended(trials: Trials) -> SettingTrials:
    base, *others = trials.found
    close, reasons = [trial for trial in others if trial.is_close], list[str]()
    for trial in others:
        if not trial.is_close:
            limit = f"states and outputs may deviate by {LARGEST_DEVIATION:.0%}"
            trials.notes.append(f"{trial.label}: not recommended, {limit} on average")
    fast = [trial for trial in close if trial.samples_per_second >= FASTER * base.samples_per_second]
    fastest = max((trial.samples_per_second for trial in fast), default=0.0)
    nearly = [trial for trial in fast if trial.samples_per_second >= NEARLY * fastest]
    best = min(nearly, key=lambda trial: trial.state_mean or 0.0, default=base)
    if best is not base:
        reasons.append(
            f"{best.label}: {best.samples_per_second / base.samples_per_second:.2f} times as fast before the cut; "
            f"states deviate by {best.state_mean:.2%}, outputs by {best.output_mean:.2%} of their spread, "
            f"{best.changed:.1%} of the outputs change"
        )
    return SettingTrials(
        trials.found,
        dict(best.settings),
        reasons,
        trials.notes,
        rate=base.samples_per_second,
        recommended_rate=best.samples_per_second,
        state_bytes=max(4 * item.numel() // len(item) for state, _ in trials.exact for item in state.values()),
    )


def with_batches(
    trials: Trials, measured: SettingTrials, units: Callable[[int], Sequence[np.ndarray]], lengths: np.ndarray
) -> SettingTrials:
    """Time batches of several sizes under the settings that `measured` recommends; return it with these trials.

    `units` gives the rows of each unit for a size of segments, and `lengths` (N,) are those of the samples, equal for
    samples of one shape: their padding is computed for the whole data set, not timed. The first encoder is tried.
    """
    encode, network = trials.project.encode, trials.networks[0]
    channels_last = bool(measured.recommended.get("encode.channels_last", encode.channels_last))
    precision = measured.recommended.get("encode.precision")
    form = network.format(None if precision is None else str(precision), channels_last=channels_last)
    count = len(network.samples)
    larger = 0 if network.device.type == "cpu" else 2  # on a CPU they seldom pay, and take memory
    sizes = sorted({max(1, min(count, int(encode.batch_size * 2.0**power))) for power in range(-3, larger + 1)})
    timed, rates = list[int](), list[float]()
    for size in sizes:
        if time.monotonic() < trials.deadline:
            timed, rates = [*timed, size], [*rates, size / network.seconds(form, size)]
    if not rates:
        return replace(measured, notes=[*measured.notes, "batch sizes: not tried, the time was up"])
    typical = float(np.median([length(sample) for sample in network.samples]))
    is_ragged = len(np.unique(lengths)) > 1

    def trial(own: dict[str, JSON]) -> SettingTrial:
        tried = encode.model_copy(update={name.removeprefix("encode."): value for name, value in own.items()})
        tokens = tried.batch_tokens
        size = f"batch_tokens {tokens}" if tokens else f"batch_size {tried.batch_size}"
        label = f"{size}, segment_samples {tried.segment_samples}"
        rate = float(np.interp(tokens / typical if tokens else tried.batch_size, timed, rates))
        if not is_ragged:
            return SettingTrial(own, label, rate)
        of = units(tried.segment_samples)
        positions = float(sum(lengths[unit].sum() for unit in of))
        padded = padded_positions(of, lengths, tried)
        return SettingTrial(own, label, rate * typical * sum(map(len, of)) / padded, padding=1 - positions / padded)

    others = [size for size in timed if size != encode.batch_size or encode.batch_tokens is not None]
    choices: list[dict[str, JSON]] = [{}]
    choices += [dict[str, JSON]({"encode.batch_size": size, "encode.batch_tokens": None}) for size in others]
    if is_ragged:
        choices += [{"encode.batch_tokens": 2 ** round(math.log2(size * typical))} for size in timed]
        state = form.run(network.prefix, network.batch(1))
        held = sum(4 * item.numel() for item in state.values()) * 4 * encode.segment_samples
        if held < HELD_BYTES and len(units(4 * encode.segment_samples)) < len(units(encode.segment_samples)):
            choices += [{**own, "encode.segment_samples": 4 * encode.segment_samples} for own in choices]
    found = [trial(own) for own in choices]
    base, fastest = found[0], max(trial.samples_per_second for trial in found)
    best = next(trial for trial in found if trial.samples_per_second > AS_FAST * fastest)  # with the fewest changes
    factor = best.samples_per_second / base.samples_per_second
    if factor < BETTER_BATCH:
        return replace(measured, batches=found)
    less = (
        "" if best.padding is None else f"; padding is {best.padding:.0%} of what is computed, not {base.padding:.0%}"
    )
    return replace(
        measured,
        batches=found,
        recommended={**measured.recommended, **best.settings},
        reasons=[*measured.reasons, f"{best.label}: {factor:.2f} times as fast before the cut{less}"],
    )


def precision_settings(project: Project, precision: str) -> dict[str, JSON]:
    """Return the settings with which every encoder holds its weights and computes in `precision`."""
    own = [f"towers.{part.tower}.model" for part in project.parts if project.towers.of(part.tower).model is not None]
    names = [*(f"{section}.dtype" for section in ("model", *own)), "encode.precision"]
    return dict.fromkeys(names, precision)


def _label(form: ComputeFormat) -> str:
    return form.precision + (", channels-last" if form.channels_last else "")


def _outputs(network: TrialNetwork, state: State) -> list[Tensor]:
    """Return the outputs of the layers after the cut, in float32, on the batch that `state` is of."""
    batch = network.batch(len(next(iter(state.values()))))
    moved, inputs = ({name: item.to(network.device) for name, item in of.items()} for of in (state, batch))
    with torch.no_grad():
        return [read_tensor(network.suffix(moved, **inputs)).float().cpu()]


def _named(state: State) -> dict[str, list[Tensor]]:
    return {f"{STATE_PREFIX}{name}": [item] for name, item in state.items()}
