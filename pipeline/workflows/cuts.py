"""The table of `recycle cuts`: costs and speed-ups of every cut, and which cuts are sensible."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.project.linear_heads import score_linear_heads
from pipeline.project.model_example import ModelExample
from pipeline.report import charts
from pipeline.report.costs import speed_ups
from pipeline.split import Candidate, candidates, split
from pipeline.split.candidates import seconds_per_sample
from pipeline.tasks import read_tensor

LITTLE = 0.1
"""Share of the operations that a cut must save, unless its state is smaller than the inputs."""
ALIKE = 0.75
"""A cut replaces another if it saves and trains at least this share of the operations that the other does."""
MEANINGFUL = 100
"""Largest speed-up that is shown."""
LINEAR_SAMPLES = 1000
"""Training samples that linear heads are fitted to; half as many validation samples score them."""


@dataclass(frozen=True)
class CutOption:
    """A line of the table. Figures unknown because the cut is refused are None."""

    at: str | int
    """The value for `encode.cuts`: a module path, or 0 for the inputs."""
    blocks: int
    """Number of blocks before it; from 2 on it names the cut as well."""
    blocks_share: float
    """Share of the blocks before it, which names the cut as well."""
    parameters_share: float | None
    """Share of the model's parameters that are frozen."""
    flops_share: float
    """Share of the operations of a forward pass that come before the cut."""
    state_bytes: int | None
    """Size of one sample's state in 16 bits per number."""
    over_full: float | None
    """Expected speed-up of a training step over full fine-tuning; None also if no operation follows the cut."""
    over_frozen: float | None
    """Expected speed-up over frozen layers that run in every step."""
    sensible: bool
    refused: str | None
    """Why the model cannot be split there, or None."""
    measured_over_full: float | None = None
    """Speed-ups as `measure` timed them."""
    measured_over_frozen: float | None = None
    linear_score: float | None = None
    """Validation score of a linear head on the states, as `score_linear_heads` gives it."""
    linear_from_here: float | None = None
    """The best linear head at this cut or a deeper one: the layers after this cut start from what that head reads."""


def choose(model: nn.Module, example: Mapping[str, Tensor]) -> list[CutOption]:
    """Return every block boundary of `model` in execution order; `example` is a batch of at least 2 samples."""
    places = candidates(model, example)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sensible = find_sensible(places, parameters)
    choices = []
    for place in places:
        total = place.flops + place.flops_after
        over_full, over_frozen = (None, None) if place.refused else speed_ups(place.flops, place.flops_after)
        choices.append(
            CutOption(
                at=place.cut.name or 0,
                blocks=place.cut.blocks_before,
                blocks_share=place.cut.share,
                parameters_share=None if place.parameters is None else place.parameters / max(1, parameters),
                flops_share=place.flops / max(1, total),
                state_bytes=place.state_bytes,
                over_full=over_full,
                over_frozen=over_frozen,
                sensible=place in sensible,
                refused=place.refused,
            )
        )
    return choices


def find_sensible(places: Sequence[Candidate], parameters: int) -> list[Candidate]:
    """Return the cuts worth trying, for a model with so many parameters.

    A place must leave something to train, and save a tenth of the operations or store less than the inputs. Of places
    that are alike the one with the smallest state stands for the others, of equal states the deepest: a place is passed
    over where one that was taken saves, and trains, at least three quarters of the operations that it does.
    """
    inputs = next((place.state_bytes for place in places if not place.cut.share), None) or 0
    taken: list[Candidate] = []
    for place in sorted(places, key=lambda place: (place.state_bytes or 0, -place.flops)):
        if place.state_bytes is None or place.parameters is None or place.parameters == parameters:
            continue
        saves_little = place.flops < LITTLE * (place.flops + place.flops_after)
        if not place.cut.share or (saves_little and place.state_bytes >= inputs):
            continue
        if not any(_stands_for(other, place) for other in taken):
            taken.append(place)
    return taken


def _stands_for(other: Candidate, place: Candidate) -> bool:
    return other.flops >= ALIKE * place.flops and other.flops_after >= ALIKE * place.flops_after


def measure(model: nn.Module, example: Mapping[str, Tensor], choices: Sequence[CutOption]) -> list[CutOption]:
    """Time training steps on `example`, forward and backward, and add the speed-ups to the sensible choices."""
    full = seconds_per_sample(_step(model.train(), model), example)
    return [_measured(model, example, choice, full) if choice.sensible else choice for choice in choices]


def _measured(model: nn.Module, example: Mapping[str, Tensor], choice: CutOption, full: float) -> CutOption:
    prefix, suffix = split(model, choice.at, dict(example))
    suffix.train()
    state = prefix(**example)
    recycled = seconds_per_sample(_step(suffix, lambda **inputs: suffix(state, **inputs)), example)
    frozen = seconds_per_sample(_step(suffix, lambda **inputs: suffix(prefix(**inputs), **inputs)), example)
    return dataclasses.replace(choice, measured_over_full=full / recycled, measured_over_frozen=frozen / recycled)


def add_linear_scores(example: ModelExample, choices: Sequence[CutOption]) -> list[CutOption]:
    """Score a linear head on the states of every cut that is not refused, in one pass over some of the samples.

    Raises:
        ConfigError: the model comes without data, or the task has no linear head.
        DataError: as `score_linear_heads`.
    """
    if example.data is None:
        raise ConfigError("--probe fits heads to the targets of params.yaml, and no data are there; see data.path")
    task, usable = example.data.loaded.task, [choice for choice in choices if not choice.refused]
    prefixes = [split(example.model, choice.at, example.inputs)[0] for choice in usable]
    scores = score_linear_heads(example.data, prefixes, samples=LINEAR_SAMPLES)
    of_cut = {choice.at: score for choice, score in zip(usable, scores, strict=True) if not math.isnan(score)}
    best, scored = max if task.higher_is_better else min, list[CutOption]()
    for number, choice in enumerate(choices):
        later = [of_cut[one.at] for one in choices[number:] if one.at in of_cut]
        from_here = None if choice.refused else best(later, default=None)
        scored.append(dataclasses.replace(choice, linear_score=of_cut.get(choice.at), linear_from_here=from_here))
    return scored


def _step(module: nn.Module, run: Callable[..., Any]) -> Callable[..., None]:
    """Return a training step of `module`, whose output `run` gives, without the optimiser."""

    def step(**inputs: Tensor) -> None:
        module.zero_grad()
        torch.autograd.backward(read_tensor(run(**inputs)).float().square().mean())

    return step


def draw(choices: Sequence[CutOption], path: Path) -> None:
    """Draw linear scores, expected speed-ups and sizes of states of the cuts that are not refused, as a PNG."""
    usable = [choice for choice in choices if not choice.refused]
    panels: dict[str, dict[str, Sequence[float | None]]] = {
        "validation score": {
            "linear head": [choice.linear_score for choice in usable],
            "best from here on": [choice.linear_from_here for choice in usable],
        },
        "expected speed-up": {
            "over full fine-tuning": [_drawn(choice.over_full) for choice in usable],
            "over frozen layers": [_drawn(choice.over_frozen) for choice in usable],
        },
        "state, KB/sample": {"state": [(choice.state_bytes or 0) / 1e3 for choice in usable]},
    }
    charts.write_png(charts.over_depth(panels, [choice.blocks_share for choice in usable]), path)


def table(choices: Sequence[CutOption]) -> str:
    """Return the choices as text, aligned for a terminal; the reasons of refusals follow."""
    columns = {
        "": ["*" if choice.sensible else "" for choice in choices],
        "cut": [str(choice.at) for choice in choices],
        "blocks": [str(choice.blocks) for choice in choices],
        "of blocks": [f"{choice.blocks_share:.0%}" for choice in choices],
        "of parameters": [_shown(choice.parameters_share, "{:.1%}") for choice in choices],
        "of FLOPs": [f"{choice.flops_share:.1%}" for choice in choices],
        "state bytes": [_shown(choice.state_bytes, "{:,}") for choice in choices],
        "x full": [_times(choice.over_full) for choice in choices],
        "x frozen": [_times(choice.over_frozen) for choice in choices],
    }
    if any(choice.measured_over_full for choice in choices):
        columns["measured x full"] = [_times(choice.measured_over_full) for choice in choices]
        columns["measured x frozen"] = [_times(choice.measured_over_frozen) for choice in choices]
    if any(choice.linear_score is not None for choice in choices):
        columns["linear head"] = [_shown(choice.linear_score, "{:.3f}") for choice in choices]
        columns["from here on"] = [_shown(choice.linear_from_here, "{:.3f}") for choice in choices]
    refusals = [f"{choice.at} is refused: {choice.refused}" for choice in choices if choice.refused]
    return "\n".join([pd.DataFrame(columns).to_string(index=False), *refusals])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _times(value: float | None) -> str:
    """Format a factor; above `MEANINGFUL`, computation is no longer the bound, and the value means nothing."""
    return f">{MEANINGFUL}" if value is not None and value > MEANINGFUL else _shown(value, "{:.1f}")


def _drawn(factor: float | None) -> float | None:
    return factor if factor is not None and factor <= MEANINGFUL else None
