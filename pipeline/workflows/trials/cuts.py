"""Cuts tried on a sample: a real encode of some hundred samples and some real training steps, scaled to the data set.

Everything is in a temporary folder of `work_dir`, which is removed at the end, also after an error.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import SampleTable, Source
from pipeline.encode import quarantine
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.keying import KeyedSamples
from pipeline.project import Project
from pipeline.project.extrapolation import choose_rows
from pipeline.report.forecast import Forecast, settings_digest
from pipeline.store import KeySet, temporary_folder
from pipeline.tasks import open_task
from pipeline.workflows.trials.encode import try_encode
from pipeline.workflows.trials.epochs import EpochTrials

MOST_SAMPLES, FEWEST_SAMPLES = 1024, 64
ENCODE_SECONDS = 6.0
"""Time that the forward passes of the sample may take."""
HELD_BYTES = 1 << 27
"""Bytes of states of the sample: an encode holds those of a few segments in memory."""
TRIED_EPOCHS = 1000
"""Epochs of the schedule of a trial, which ends long before."""


@dataclass(frozen=True)
class CutTrials:
    """What the trials of the cuts gave."""

    forecast: Forecast
    codecs: list[dict[str, Any]] = field(default_factory=list)
    """The errors of each codec, as `CodecDeviation`."""
    codecs_of: str = ""
    """The cut, and the tower, whose states were stored by each codec."""
    cut_off: int = 0
    """Texts of the sample that are longer than `preprocess.max_length`."""
    undecodable: str = ""
    """Samples of the sample that cannot be decoded: counts by reason."""


def measure_cuts(
    project: Project,
    source: Source,
    keyed: KeyedSamples,
    table: SampleTable,
    rate: float | None,
    state_bytes: int,
    deadline: float,
) -> CutTrials:
    """Encode a sample at every cut, and at 0 for full fine-tuning; train some steps of each; scale to the data set.

    `rate` are samples per second before the deepest cut, None if nothing is before it, and `state_bytes` those of its
    states in memory. After `deadline`, a value of `time.monotonic`, no training is tried.
    """
    with temporary_folder(project.work_dir) as folder:
        trial = _in_folder(project, folder)
        replace(table, views=trial.encode.views).write(trial.samples)
        training = trial.training_table()
        chosen = choose_rows(open_task(trial.task), training, trial.train, _sample_size(project, rate, state_bytes))
        wanted = np.flatnonzero(KeySet(training.keys[chosen]).contains(keyed.keys))
        tried = [try_encode(part, source, keyed, table, wanted) for part in trial.parts]
        bad = [one for part in tried for one in part.result.keyed.bad[len(keyed.bad) :]]
        kept = ~KeySet(keyed.keys[[one.row for one in bad]]).contains(training.keys[chosen])
        epochs = EpochTrials(trial, training, chosen[kept], keyed, tried, project)
        forecasts = epochs.forecasts(deadline)
        full = next((one.epoch_seconds for one in forecasts if not one.recycled), None)
        notes = [f"cut {one.cut}: {one.reason}" for one in forecasts if one.reason]
        forecast = Forecast(
            settings=settings_digest(project),
            samples_tried=len(chosen),
            encode_seconds=sum(part.wall_seconds for part in tried),
            full_epoch_seconds=full,
            total_bytes=epochs.total_bytes,
            epochs=epochs.per_run,
            cuts=[one for one in forecasts if one.cut in project.encode.cuts],
            notes=notes + _limits(project),
        )
        codecs, label = epochs.codecs(deadline)
        texts = sum(len(part.result.cut_off) for part in tried)
        return CutTrials(forecast, codecs, label, texts, quarantine.summary(bad))


def _in_folder(project: Project, folder: Path) -> Project:
    """Return the project with all its files in `folder`, which encodes in this process, at the cut 0 too."""
    cuts = project.encode.cuts if 0 in project.encode.cuts else [*project.encode.cuts, 0]
    here: dict[str, Any] = {
        "store": None,
        "store_options": {},
        "executor": ExecutorConfig(),
        "suffix": True,
        "cuts": cuts,
    }
    longer = {"epochs": TRIED_EPOCHS, "max_steps": None, "eval_every": None, "loggers": ()}
    return replace(
        project,
        encode=project.encode.model_copy(update=here),
        train=project.train.model_copy(update=longer),
        activations=folder / "activations",
        samples=folder / "samples.parquet",
        quarantine=folder / "quarantine.csv",
        results=folder / "results",
        work_dir=folder / "work",
    )


def _sample_size(project: Project, rate: float | None, state_bytes: int) -> int:
    """Return how many samples are encoded; `rate` is None where nothing is computed before the cuts."""
    fitting = MOST_SAMPLES if rate is None else rate * ENCODE_SECONDS / len(project.views)
    held = HELD_BYTES / max(1, state_bytes * len(project.encode.cuts))
    return int(np.clip(min(fitting, held), FEWEST_SAMPLES, MOST_SAMPLES))


def _limits(project: Project) -> list[str]:
    """Return what the predictions leave out under these settings."""
    found = []
    if project.encode.store is not None:
        found.append("the store is remote: its disk and the time of transfers are not measured; writing is local here")
    if not project.encode.executor.is_here:
        found.append("encode seconds are those of one process on this machine, without encode.executor")
    return found
