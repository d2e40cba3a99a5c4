"""Predict: inputs -> keys -> states, stored or new -> suffixes of finished runs -> predictions.

Inputs are processed in order, in spans with a bounded number of new samples. New samples are encoded as by `encode`,
into the store or into a temporary one that is emptied after every span, and are read back from there: the prediction of
a sample does not depend on whether it was stored.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.data import Source
from pipeline.encode import quarantine
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample
from pipeline.keys import KEY_BYTES
from pipeline.project import Project
from pipeline.runs.finished import FinishedRun, has_states, open_run
from pipeline.runs.input_states import InputStates, temporary_states
from pipeline.runs.predictions import DESCRIBED, Predictions, check_format, described, merged_schema, open_output
from pipeline.store import KeySet
from pipeline.tasks import Column, Kind, PredictionContext

log = logging.getLogger("recycle")

ROWS_AT_ONCE = 1 << 13
"""Number of inputs whose predictions are held in memory."""
HEX = 2 * KEY_BYTES


def predict_project(
    project: Project,
    names: Sequence[str],
    inputs: str | None,
    output: Path,
    *,
    write: bool = False,
    tower: str | None = None,
) -> bool:
    """Write the predictions of the finished runs `names` to the file `output`, a row for each input, in order.

    Inputs are the project's own data set, or data of the same kind at the path `inputs`, whose labels are not read.
    Where there is an encoder for each role, they are the samples in the role `tower`, which must be named. With
    `write`, the states of new samples stay in the stores. Returns whether the bad inputs stay within `encode.max_bad`.

    Raises:
        ConfigError: the output's format is unknown, there is no such tower, or a setting names nothing that exists.
        DataError: the inputs cannot be read, or a run does not exist or does not fit today's settings and samples.
        StaleStoreError: a store was encoded under another recipe; the message names the first field that differs.
    """
    check_format(output)
    source = project.part(tower).source(inputs)
    keyed = project.keys_of(source)
    wanted, runs = keyed.keys[keyed.good], list(dict.fromkeys(names))
    all_stored = all(has_states(project, name, tower, wanted) for name in runs)
    by_store: dict[Path, dict[str, FinishedRun]] = {}
    for name in runs:
        run = open_run(project, name, tower, suffix_only=all_stored)
        by_store.setdefault(run.store.path, {})["" if len(runs) == 1 else f"{name}/"] = run
    home = project.work_dir / "predict"
    with ExitStack() as folders:
        # Stores of one path are of one recipe: opening them proved it.
        shared = [
            SharedStates(runs, source, keyed, None if write else folders.enter_context(temporary_states(home)))
            for runs in by_store.values()
        ]
        if write:
            for states in shared:
                states.encode(keyed.good)
        predict_spans(source, keyed, shared, output)
    return _tell(project, keyed, shared, output)


class SharedStates(InputStates):
    """The predictions of the runs of one store, whose states they share."""

    def __init__(
        self, runs: Mapping[str, FinishedRun], source: Source, keyed: KeyedSamples, folder: Path | None
    ) -> None:
        """Prepare to predict on `source`; `runs` are by the prefix of their column names."""
        super().__init__(next(iter(runs.values())), source, keyed, folder)
        self.runs = runs
        for run in runs.values():
            run.suffix.to(self.device)
        self.predictions = Predictions(self._columns())

    def predict(self, rows: np.ndarray) -> None:
        """Add the runs' predictions for `rows` (n,) int64, all distinct; bad samples are left out."""
        for chosen, batch in self.read(rows):
            numbers = rows[chosen]
            context = PredictionContext(batch.targets, partial(self._targets, numbers))
            columns: dict[str, Column] = {}
            for beginning, run in self.runs.items():
                with run.inference(self.device):
                    output = run.suffix(batch.state, **batch.inputs)
                predicted = run.loaded.task.predictions(output, context, run.legend)
                columns |= {beginning + name: values for name, values in predicted.items()}
            self.predictions.add(numbers, columns)

    def _targets(self, rows: np.ndarray) -> list[Mapping[str, Any]]:
        return [self.source.row(row).targets for row in rows.tolist()]

    def _columns(self) -> Mapping[str, Kind]:
        kinds = {beginning: run.loaded.task.columns(run.legend) for beginning, run in self.runs.items()}
        return {beginning + name: kind for beginning, of in kinds.items() for name, kind in of.items()}


def predict_spans(source: Source, keyed: KeyedSamples, shared: Sequence[SharedStates], output: Path) -> None:
    """Write the predictions of all inputs, span by span; equal inputs share the predictions of the first."""
    first, numbers = KeySet(keyed.keys).find(keyed.keys), np.arange(len(keyed.keys))
    last = numbers.copy()
    last[first] = numbers
    new = np.logical_or.reduce([states.missing() for states in shared]) & (first == numbers)
    schema = merged_schema([DESCRIBED, *(states.predictions.schema for states in shared)])
    with (
        open_output(output, schema) as append,
        tqdm(total=len(first), desc="predict", unit="sample", disable=None) as progress,
    ):
        for rows in _spans(new, shared[0].config.segment_samples):
            for states in shared:
                bad = [sample.row for sample in states.result.keyed.bad]
                states.predict(np.setdiff1d(rows[first[rows] == rows], bad))
            predicted = [states.predictions.take(first[rows]) for states in shared]
            append([described(*_describe_rows(source, keyed, rows, _bad(shared))), *predicted])
            for states in shared:
                states.predictions.keep(np.flatnonzero(last[: rows[-1] + 1] > rows[-1]))
            progress.update(len(rows))


def _spans(new: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Divide all rows into spans of at most `ROWS_AT_ONCE` rows, of which at most `most` are `new` (N,) bool."""
    stretch = np.maximum(np.cumsum(new) - 1, 0) // most
    by_count = np.arange(len(new)) // ROWS_AT_ONCE
    begins = np.flatnonzero((np.diff(stretch, prepend=-1) != 0) | (np.diff(by_count, prepend=-1) != 0))
    return iter(np.split(np.arange(len(new)), begins[1:]))


def _describe_rows(
    source: Source, keyed: KeyedSamples, rows: np.ndarray, bad: Mapping[int, BadSample]
) -> tuple[list[str], list[str | None], list[str | None]]:
    """Return the name of each row, its key in hex and, for a bad one, the reason."""
    keys, has_key = keyed.keys[rows].tobytes().hex(), keyed.keys[rows].any(axis=1).tolist()
    in_hex = [keys[i * HEX : (i + 1) * HEX] if has_key[i] else None for i in range(len(rows))]
    reasons = [bad[row].reason if row in bad else None for row in rows.tolist()]
    return [quarantine.name_of(source, row) for row in rows.tolist()], in_hex, reasons


def _bad(shared: Sequence[SharedStates]) -> dict[int, BadSample]:
    return {sample.row: sample for states in shared for sample in states.result.keyed.bad}


def _tell(project: Project, keyed: KeyedSamples, shared: Sequence[SharedStates], output: Path) -> bool:
    """Log what was done; return whether at most as many inputs are bad as allowed."""
    for states in shared:
        log.info(
            "%s: the prefix ran on %d of %d inputs%s",
            *(
                states.known.path,
                states.result.new[0],
                len(keyed.keys),
                "" if states.forgets else ", which joined the store",
            ),
        )
    bad, total = _bad(shared), len(keyed.keys)
    if bad:
        log.warning("%d bad inputs, their rows say why: %s", len(bad), quarantine.summary(list(bad.values())))
    if len(bad) > project.encode.tolerated(total):
        log.error("%d bad inputs, encode.max_bad allows %d of %d", len(bad), project.encode.tolerated(total), total)
    return len(bad) <= project.encode.tolerated(total)
