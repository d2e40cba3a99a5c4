"""Evaluate: a finished run + labelled samples -> scores, from states and, if asked for, through the full model.

Samples are those of the project, whose states are stored, or other data of the same kind, of which known samples are
read from the store and new ones encoded into a temporary one, as for predictions.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipeline.device import pick_device
from pipeline.encode import quarantine
from pipeline.encode.decoding import Chunk, decode_rows, finished_samples
from pipeline.encode.quarantine import BadSample
from pipeline.encode.ragged import Sample, pad_batch, shapes
from pipeline.errors import DataError, first_few
from pipeline.models import EXTRA, network_inputs
from pipeline.precision import widen
from pipeline.project import Project
from pipeline.runs.finished import FinishedRun, has_states, open_run, towers_of
from pipeline.runs.input_states import InputStates, stored_batches, temporary_states
from pipeline.runs.record import read_run
from pipeline.runs.reference import read_reference
from pipeline.runs.scored_samples import ScoredSamples, input_samples, own_samples
from pipeline.split import merge
from pipeline.tasks import Prepared, Task, read_tensor

log = logging.getLogger("recycle")

Outputs: TypeAlias = tuple[np.ndarray, Any, Mapping[str, Tensor]]
"""Rows of the table (B,) int64, the outputs of their samples, and their extras."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a run on some samples."""

    run: str
    data: str
    """What the samples are: a split, or the path of other data."""
    samples: int
    """Number of samples that the scores are of."""
    bad: int
    """Number of samples that cannot be used, and are left out."""
    cached: dict[str, float]
    """Scores from states."""
    live: dict[str, float] = field(default_factory=dict)
    """Scores of the full model on the raw data; empty unless asked for."""

    @property
    def largest_difference(self) -> float | None:
        """The largest difference between cached and live scores; None where there is no live score."""
        known = [abs(value - self.live[name]) for name, value in self.cached.items() if name in self.live]
        return max((value for value in known if not math.isnan(value)), default=None)


def evaluate_run(
    project: Project, name: str, inputs: str | None = None, split: str | None = None, *, live: bool = False
) -> tuple[Evaluation, bool]:
    """Return the scores of the finished run `name`, and whether the bad samples stay within `encode.max_bad`.

    Samples are those of the project's `split`, "test" if None, or labelled data of the same kind at the path `inputs`:
    all of it, or its `split`. With `live`, the merged full model is scored on their raw data, too.

    Raises:
        ConfigError: a setting names nothing that exists.
        DataError: there is no such sample, a label is unknown to the run, or the run does not fit today's settings.
        StaleStoreError: a store was encoded under another recipe; the message names the first field that differs.
    """
    project = project.overridden(read_run(project, name).overrides)
    if inputs is None:
        samples = own_samples(project, split or "test", raw=live)
    else:
        samples = input_samples(project, inputs, split)
    roles = towers_of(project, name)
    wanted = {role: samples.table.keys[samples.rows[samples.in_role(role)]] for role in roles}
    all_stored = not samples.is_new or all(has_states(project, name, *one) for one in wanted.items())
    towers = [open_run(project, name, role, suffix_only=all_stored and not live) for role in roles]
    task, bad = towers[0].loaded.task, dict[int, BadSample]()
    if task.needs_reference:
        task.reference = read_reference(project.run_path(name), samples.table.keys)
        if np.isnan(task.reference[samples.rows]).any():
            raise DataError(
                f"run {name} on {samples.data}: the run keeps what the untrained network gave its own samples, which "
                "these are not; evaluate a split of the project"
            )
    targets = _numbered(task, samples, towers[0].legend, name)
    cached, count = _scores(task, samples, targets, _cached(project, towers, samples, bad))
    found, _ = _scores(task, samples, targets, _live(towers, samples, bad)) if live else ({}, 0)
    unread = [] if inputs is None or samples.keyed is None else samples.keyed.bad
    evaluation = Evaluation(name, samples.data, count, len(unread) + samples.like(bad), cached, found)
    _tell([*unread, *bad.values()], evaluation)
    allowed = project.encode.tolerated(len(samples.rows) + len(unread))
    if evaluation.bad > allowed:
        log.error("%d bad samples, encode.max_bad allows %d", evaluation.bad, allowed)
    return evaluation, evaluation.bad <= allowed


def _numbered(task: Task, samples: ScoredSamples, legend: Sequence[Any], name: str) -> Mapping[str, Prepared]:
    """Return the numeric targets of the whole table, whose numbers are those of the run's outputs.

    Raises:
        DataError: a label is unknown to the run, or the training labels have changed since.
    """
    try:
        targets, today = task.prepare(samples.table), json.loads(json.dumps(task.legend(samples.table)))
    except DataError as error:
        raise DataError(f"run {name} on {samples.data}: {error}") from error
    if legend and today != list(legend):
        then, now = (first_few(map(repr, one)) for one in (legend, today))
        raise DataError(
            f"run {name} on {samples.data}: its outputs mean {then}, and the labels now give {now}; train it again, or "
            "write the labels as they were"
        )
    return targets


def _cached(
    project: Project, towers: Sequence[FinishedRun], samples: ScoredSamples, bad: dict[int, BadSample]
) -> Iterator[Outputs]:
    """Yield the outputs of all samples from their states; add samples that have none to `bad`, by source row."""
    home, device = project.work_dir / "evaluate", pick_device(project.encode.device)
    for tower in towers:
        tower.suffix.to(device)
        chosen = samples.in_role(tower.name)
        with temporary_states(home) as folder:
            if samples.is_new:
                source, keyed, rows = samples.raw(chosen)
                states = InputStates(tower, source, replace(keyed, rows=np.unique(rows)), folder)
                batches = states.read(rows)
            else:
                places = tower.store.first_places(np.searchsorted(tower.rows, samples.rows[chosen]))
                reader = tower.loaded.project.reader(tower.store.path)
                batches = stored_batches(tower.loaded, places, reader, device)
            for index, batch in batches:
                with tower.inference(device):
                    output = tower.suffix(batch.state, **batch.inputs)
                yield samples.rows[chosen[index]], output, batch.targets
            if samples.is_new:
                bad |= {one.row: one for one in states.result.keyed.bad if one not in keyed.bad}


def _live(towers: Sequence[FinishedRun], samples: ScoredSamples, bad: dict[int, BadSample]) -> Iterator[Outputs]:
    """Yield the outputs of the merged full models for the raw data; add samples that cannot be used to `bad`."""
    for tower in towers:
        loaded, chosen = tower.loaded, samples.in_role(tower.name)
        source, keyed, rows = samples.raw(chosen)
        device = loaded.to_device()
        network = merge(widen(loaded.backbone.model), tower.suffix).eval()
        preprocess = loaded.preprocess(0 if samples.is_augmented and loaded.project.encode.views else None)
        order, size = np.argsort(keyed.sizes[rows], kind="stable"), loaded.project.encode.batch_size
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            (decoded,) = decode_rows(source, Chunk(rows[part], [preprocess], keyed.keys[rows[part]]))
            bad |= {one.row: one for one in decoded.bad}
            good = part[~np.isin(rows[part], [one.row for one in decoded.bad])]
            for index, batch in _alike(good, finished_samples(preprocess, decoded)):
                on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                with tower.inference(device):
                    output = network(**network_inputs(on_device))
                extras = {name.removeprefix(EXTRA): item for name, item in batch.items() if name.startswith(EXTRA)}
                yield samples.rows[chosen[index]], output, extras


def _alike(numbers: np.ndarray, samples: Sequence[Sample]) -> Iterator[tuple[np.ndarray, Sample]]:
    """Yield samples of equal shapes as batches, which need no padding, with their `numbers`."""
    by_shapes: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        by_shapes.setdefault(shapes(sample), []).append(place)
    for places in by_shapes.values():
        yield numbers[places], pad_batch([samples[place] for place in places], {})


def _scores(
    task: Task, samples: ScoredSamples, targets: Mapping[str, Prepared], outputs: Iterable[Outputs]
) -> tuple[dict[str, float], int]:
    """Return the scores of `outputs`, and the number of samples that they are of."""
    metrics, count = task.metrics(), 0
    if samples.pairs is not None:
        outputs = _of_whole_pairs(samples.pairs, list(outputs))
    for rows, output, extras in outputs:
        numbers = {name: torch.from_numpy(values[rows]) for name, values in targets.items()}
        metrics.update(output, {**numbers, **extras})
        count += len(rows)
    return metrics.compute(), count


def _of_whole_pairs(pairs: np.ndarray, outputs: Sequence[Outputs]) -> Iterator[Outputs]:
    """Yield the outputs without those of samples whose partner has none; `pairs` (N,) are those of the whole table."""
    numbers, counts = np.unique(pairs[np.concatenate([rows for rows, _, _ in outputs])], return_counts=True)
    if lone := int((counts == 1).sum()):
        log.warning("%d pairs are not scored: one of the two cannot be used", lone)
    for rows, output, extras in outputs:
        kept = np.isin(pairs[rows], numbers[counts == 2])
        yield rows[kept], read_tensor(output)[torch.from_numpy(kept)], extras


def _tell(bad: Sequence[BadSample], evaluation: Evaluation) -> None:
    """Log which samples are bad, and which scores cannot be computed."""
    if bad:
        log.warning("%d bad samples are not scored: %s", evaluation.bad, quarantine.summary(bad))
    if absent := [name for name, value in evaluation.cached.items() if math.isnan(value)]:
        log.warning(
            "%s cannot be computed of these %d samples: they have too few that can be compared",
            *(", ".join(absent), evaluation.samples),
        )
