"""Settings of an encode tried on this machine: the rate of the bare prefix under each, and what each changes.

One setting is varied at a time, from the best of the others. The network is built and split once, at its deepest cut;
its weights are converted in place, and the prefix runs on one prepared batch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data import SampleTable, Source
from pipeline.device import is_emulated
from pipeline.encode import quarantine
from pipeline.encode.decoding import Chunk, decode_rows, finished_samples
from pipeline.encode.ragged import Sample, length, pad_batch, shapes
from pipeline.errors import DataError
from pipeline.keys import JSON
from pipeline.models import network_inputs
from pipeline.precision import ComputeFormat
from pipeline.project import Project
from pipeline.project.extrapolation import padded_positions, predict_lengths
from pipeline.project.model import LoadedModel
from pipeline.split import Prefix, State, Suffix, places
from pipeline.split.forward import synchronise
from pipeline.store import STATE_PREFIX
from pipeline.tasks import read_tensor
from pipeline.workflows.codec_error import compare_outputs, compare_states

FASTER, BETTER_BATCH = 1.2, 1.1
"""Factors by which another precision, and another batch size, must be faster to be recommended."""
NEARLY = 0.85
"""Share of the speed of the fastest from which the most exact one is recommended."""
AS_FAST = 0.95
"""Share of the speed of the best batches from which those with the fewest changes are recommended."""
LARGEST_DEVIATION = 0.1
"""Largest mean deviation, of states and of outputs, of a precision that is recommended."""
SECONDS_EACH = 0.5
REPEATS = 3
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
        """Whether its deviations are small enough to be recommended; NaN is not."""
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


@dataclass(frozen=True)
class Bench:
    """A network on its device, split at the deepest cut, with samples to run it on."""

    loaded: LoadedModel
    prefix: Prefix
    suffix: Suffix
    """With weights of its own, in float32."""
    samples: list[Sample]
    rows: np.ndarray
    """Rows of the samples in the source."""
    device: torch.device
    originals: Mapping[str, Tensor]
    """The floating-point tensors of the network as they came, by name."""

    @classmethod
    def open(cls, part: Project, source: Source, table: SampleTable, rows: np.ndarray) -> "Bench":
        """Build the network of one encoder, and read `rows` (n,) of `source`.

        Raises:
            DataError: none of them can be decoded.
        """
        loaded = LoadedModel.open(part, table)
        device, preprocess = loaded.to_device(), loaded.backbone.preprocess
        (decoded,) = decode_rows(source, Chunk(rows, [preprocess]))
        samples = finished_samples(preprocess, decoded)
        if not samples:
            raise DataError(f"none of {len(rows)} samples can be decoded: {quarantine.summary(decoded.bad)}")
        by_length = sorted(samples, key=length)
        example = loaded.on_device([by_length[0], by_length[-1]])
        named = [part.at(cut) for cut in part.encode.cuts]
        shares = [cut.share for cut in places(loaded.backbone.model, named, example)]
        prefix, suffix = loaded.split(named[int(np.argmax(shares))], example)
        state = loaded.backbone.model.state_dict(keep_vars=True)
        originals = {name: item.data for name, item in state.items() if item.is_floating_point()}
        return cls(loaded, prefix, suffix.float().eval(), samples, decoded.rows, device, originals)

    def format(self, precision: str | None, *, channels_last: bool) -> ComputeFormat:
        """Have the network hold its weights and compute in `precision`, None for what params.yaml says."""
        model = self.loaded.backbone.model
        for name, item in model.state_dict(keep_vars=True).items():
            if name in self.originals:
                item.data = self.originals[name] if precision is None else self.originals[name].to(dtype_of(precision))
        model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        weights = self.loaded.backbone.dtype if precision is None else dtype_of(precision)
        own = self.loaded.project.encode.precision if precision is None else None
        return ComputeFormat.of(self.device, weights, own, channels_last=channels_last)

    def batch(self, count: int) -> dict[str, Tensor]:
        """Return `count` of the samples, of similar lengths, as a batch."""
        by_length = sorted(self.samples, key=length)
        begin = (len(by_length) - count) // 2
        return network_inputs(pad_batch(by_length[begin : begin + count], self.loaded.backbone.preprocess.pad))

    def seconds(self, form: ComputeFormat, count: int) -> float:
        """Return the least of some times of a forward pass over `count` samples, after a warm-up."""
        batch, times = self.batch(count), list[float]()
        while len(times) <= REPEATS and sum(times) < SECONDS_EACH:
            began = time.perf_counter()
            form.run(self.prefix, batch)
            synchronise(self.device)
            times.append(time.perf_counter() - began)
        return min(times[1:] or times)

    def lengths(self, sizes: np.ndarray) -> np.ndarray:
        """Return the positions of each row, (N,) int64; `sizes` (N,) are those of the contents."""
        if len({shapes(sample) for sample in self.samples}) == 1:
            return np.ones(len(sizes), np.int64)
        return predict_lengths(sizes, self.rows, [length(sample) for sample in self.samples])


@dataclass
class Trials:
    """The trials of one project."""

    project: Project
    benches: Sequence[Bench]
    """One for each encoder."""
    deadline: float
    """Value of `time.monotonic` after which no trial begins."""
    found: list[SettingTrial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def exact(self) -> list[tuple[State, list[Tensor]]]:
        """States and outputs of a batch in float32 and the contiguous memory format, for each encoder."""
        states = [self._state(bench, bench.format("float32", channels_last=False)) for bench in self.benches]
        return [(state, _outputs(bench, state)) for bench, state in zip(self.benches, states, strict=True)]

    def try_out(self, label: str, precision: str | None, *, channels_last: bool) -> SettingTrial | None:
        """Time all encoders, and compare states and outputs with the exact ones; None where the time is up."""
        if self.found and time.monotonic() > self.deadline:
            self.notes.append(f"{label}: not tried, the time was up")
            return None
        seconds, worst = 0.0, [0.0, 0.0, 0.0]
        for bench, (exact, outputs) in zip(self.benches, self.exact, strict=True):
            form = bench.format(precision, channels_last=channels_last)
            few = min(4, len(bench.samples))
            fitting = int(SECONDS_EACH * few / bench.seconds(form, few))
            count = max(1, min(len(bench.samples), self.project.encode.batch_size, fitting))
            seconds += bench.seconds(form, count) / count
            state = self._state(bench, form)
            _, of_states = compare_states(_named(exact), _named(state))
            _, *of_outputs = compare_outputs(outputs, _outputs(bench, state), bench.loaded.head.kind)
            worst = [max(pair) for pair in zip(worst, (of_states, *of_outputs), strict=True)]
            label = _label(form)
        settings: dict[str, JSON] = {"encode.channels_last": channels_last}
        if channels_last == self.project.encode.channels_last:
            settings = {}
        if precision is not None:
            settings |= precision_settings(self.project, precision)
        self.found.append(SettingTrial(settings, label, len(self.benches) / seconds, worst[0], worst[1], worst[2]))
        return self.found[-1]

    def _state(self, bench: Bench, form: ComputeFormat) -> State:
        batch = bench.batch(min(COMPARED, len(bench.samples)))
        return {name: item.float().cpu() for name, item in form.run(bench.prefix, batch).items()}


def measure_settings(trials: Trials) -> SettingTrials:
    """Try memory format and precision, one after the other; return what was measured and is recommended."""
    encode, (bench, *_) = trials.project.encode, trials.benches
    channels_last = encode.channels_last
    trials.try_out("the settings as they are", None, channels_last=channels_last)
    if any(item.dim() == 4 and item.is_floating_point() for item in bench.batch(1).values()):
        other = trials.try_out("the other memory format", None, channels_last=not channels_last)
        if other is not None and other.samples_per_second > trials.found[0].samples_per_second:
            channels_last = not channels_last
    for precision in PRECISIONS:
        label = _label(ComputeFormat(bench.device, dtype_of(precision), precision, channels_last))
        if is_emulated(precision, bench.device):
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
    encode, bench = trials.project.encode, trials.benches[0]
    channels_last = bool(measured.recommended.get("encode.channels_last", encode.channels_last))
    precision = measured.recommended.get("encode.precision")
    form = bench.format(None if precision is None else str(precision), channels_last=channels_last)
    count = len(bench.samples)
    larger = 0 if bench.device.type == "cpu" else 2  # on a CPU they seldom pay, and take memory
    sizes = sorted({max(1, min(count, int(encode.batch_size * 2.0**power))) for power in range(-3, larger + 1)})
    timed, rates = list[int](), list[float]()
    for size in sizes:
        if time.monotonic() < trials.deadline:
            timed, rates = [*timed, size], [*rates, size / bench.seconds(form, size)]
    if not rates:
        return replace(measured, notes=[*measured.notes, "batch sizes: not tried, the time was up"])
    typical = float(np.median([length(sample) for sample in bench.samples]))
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
        state = form.run(bench.prefix, bench.batch(1))
        held = sum(4 * item.numel() for item in state.values()) * 4 * encode.segment_samples
        if held < HELD_BYTES:
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


def dtype_of(precision: str) -> torch.dtype:
    """Return the type called `precision`."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def _label(form: ComputeFormat) -> str:
    return form.precision + (", channels-last" if form.channels_last else "")


def _outputs(bench: Bench, state: State) -> list[Tensor]:
    """Return the outputs of the layers after the cut, in float32, on the batch that `state` is of."""
    batch = bench.batch(len(next(iter(state.values()))))
    moved, inputs = ({name: item.to(bench.device) for name, item in of.items()} for of in (state, batch))
    with torch.no_grad():
        return [read_tensor(bench.suffix(moved, **inputs)).float().cpu()]


def _named(state: State) -> dict[str, list[Tensor]]:
    return {f"{STATE_PREFIX}{name}": [item] for name, item in state.items()}
