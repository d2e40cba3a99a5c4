"""Cuts tried on a sample: a real encode of some hundred samples and some real training steps, scaled to the data set.

Everything is in a temporary folder of `work_dir`, which is removed at the end, also after an error.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import SampleTable, Source, rows_in_role
from pipeline.encode import quarantine
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.decoding import Chunk, decode_rows, finished_samples
from pipeline.encode.encoder import compute_format
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.ragged import length, pad_batch, shapes
from pipeline.encode.unit import EncodeResult
from pipeline.errors import RecyclingError
from pipeline.memory import release_freed_memory
from pipeline.models import Preprocess, network_inputs
from pipeline.project import CutName, Project
from pipeline.project.extrapolation import (
    SEED,
    batch_positions,
    choose_rows,
    epoch_positions,
    padded_positions,
    predict_lengths,
    units_of,
)
from pipeline.project.towers import new_parameters, open_tower
from pipeline.project.views import split_numbers
from pipeline.report.forecast import CutForecast, Forecast, settings_digest
from pipeline.split import Capture
from pipeline.store import (
    ATTACHMENTS,
    SUFFIX,
    KeySet,
    Store,
    first_rows,
    folder_nbytes,
    projected_nbytes,
    temporary_folder,
)
from pipeline.tasks import open_task
from pipeline.train.fit import open_accelerator, train_round
from pipeline.train.loader import Batch
from pipeline.train.objective import Objective, prepare
from pipeline.train.optimizer import open_optimizer, schedule
from pipeline.train.rounds import Batches, Rounds
from pipeline.workflows.codec_error import compare
from pipeline.workflows.encode import OpenEncode, encode_views, open_encode, rows_to_encode
from pipeline.workflows.train import OpenCut, open_suffix

MOST_SAMPLES, FEWEST_SAMPLES = 1024, 64
ENCODE_SECONDS = 6.0
"""Time that the forward passes of the sample may take."""
TRAIN_SECONDS = 2.0
"""Time of the steps that are timed for each cut."""
HELD_BYTES = 1 << 27
"""Bytes of states of the sample: an encode holds those of a few segments in memory."""
LENGTH_SECONDS, LENGTHS_AT_ONCE = 3.0, 256
"""Time in which lengths are counted beyond the sample, and the number of rows counted at a time."""
CODEC_SAMPLES = 64
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


@dataclass(frozen=True, eq=False)
class EncodeTrial:
    """The encode of the sample by one encoder, and the factors from the sample to the data set."""

    project: Project
    stores: list[list[Store]]
    shares: list[float]
    """Share of the blocks before each cut."""
    result: EncodeResult
    lengths: np.ndarray
    """Positions of each row of the source, (N,) int64; ones where all samples have one shape."""
    states: int
    """States of the data set at one cut, all views."""
    padding: float
    """Positions per state with padding in the data set over those in the sample, which the forward time grows with."""
    size: float
    """The same without padding, which the time of writing grows with."""
    nbytes: list[int]
    """Bytes of all states at each cut."""

    def number(self, cut: CutName) -> int:
        """Return the number of this encoder's cut in runs of `cut`."""
        return self.project.encode.cuts.index(self.project.at(cut))

    def seconds(self, cut: CutName) -> dict[str, float]:
        """Return the seconds per state of the data set of each step of an encode of one cut."""
        steps: dict[str, float] = self.result.costs.of(self.number(cut))["seconds_per_sample"]
        forward = steps["forward"] * self.padding if self.shares[self.number(cut)] else 0.0
        return {"read": steps["read"], "forward": forward, "write": steps["write"] * self.size}

    @property
    def wall_seconds(self) -> float:
        """Seconds of an encode of the data set at all cuts at once."""
        costs = self.result.costs
        return costs.elapsed / max(1, costs.samples) * self.states * self.padding

    def beside_bytes(self, cut: CutName, *, suffix: bool) -> int:
        """Return the bytes of what lies beside the states of a cut, with or without the pretrained suffix."""
        stores = [of_view[self.number(cut)] for of_view in self.stores]
        folders = [store.path / name for store in stores for name in ATTACHMENTS if suffix or name != SUFFIX]
        return sum(folder_nbytes(folder) for folder in folders if folder.is_dir())


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
        tried = [_encode_part(part, source, keyed, table, wanted) for part in trial.parts]
        bad = [one for part in tried for one in part.result.keyed.bad[len(keyed.bad) :]]
        kept = ~KeySet(keyed.keys[[one.row for one in bad]]).contains(training.keys[chosen])
        epochs = _Epochs(trial, training, chosen[kept], keyed, tried, project)
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


def _encode_part(
    part: Project, source: Source, keyed: KeyedSamples, table: SampleTable, wanted: np.ndarray
) -> EncodeTrial:
    """Encode the rows `wanted` (n,) of `source` that are one encoder's, and scale what it took to all rows."""
    of_part = None if part.tower is None else rows_in_role(source, keyed.good, part.tower)
    everything = replace(keyed, rows=of_part)
    sample = replace(keyed, rows=everything.selected(wanted))
    opened = open_encode(part, source, sample, table, replace_stores=False)
    rows, lengths = sample.good, np.ones(len(keyed.keys), np.int64)
    if shapes(opened.samples[0]) != shapes(opened.samples[-1]):
        lengths = _lengths(opened.loaded.backbone.preprocess, source, everything, rows)
    release_freed_memory()
    _warm_up(opened)
    result = encode_views(opened.encoder(source, sample), part, source, sample, table, opened.stores)
    good = 1 - (len(result.keyed.bad) - len(sample.bad)) / len(rows)
    return _scaled(part, opened, result, everything, lengths, table, good)


def _lengths(preprocess: Preprocess, source: Source, keyed: KeyedSamples, rows: np.ndarray) -> np.ndarray:
    """Return the positions of each row, (N,) int64, from those of the sample's `rows` and of as many as time allows."""
    others = np.random.default_rng(SEED).permutation(np.setdiff1d(keyed.good, rows))
    lengths, known = list[int](), list[np.ndarray]()
    end = time.monotonic() + LENGTH_SECONDS
    for some in (rows, *np.array_split(others, len(others) // LENGTHS_AT_ONCE + 1)):
        (decoded,) = decode_rows(source, Chunk(some, [preprocess]))
        lengths += [length(sample) for sample in finished_samples(preprocess, decoded)]
        known.append(decoded.rows)
        if time.monotonic() > end:
            break
    return predict_lengths(keyed.sizes, np.concatenate(known), lengths)


def _warm_up(opened: OpenEncode) -> None:
    """Run the prefixes on a whole batch: a first pass of its size prepares kernels, and takes memory."""
    encode, preprocess = opened.loaded.project.encode, opened.loaded.backbone.preprocess
    samples = opened.samples * (encode.batch_size // len(opened.samples) if encode.batch_tokens is None else 1)
    inputs = network_inputs(pad_batch(samples or opened.samples, preprocess.pad))
    for _ in range(2):
        compute_format(opened.prefixes, encode).run(Capture(opened.prefixes), inputs)


def _scaled(
    part: Project,
    opened: OpenEncode,
    result: EncodeResult,
    everything: KeyedSamples,
    lengths: np.ndarray,
    table: SampleTable,
    good: float,
) -> EncodeTrial:
    """Scale `result` to the rows of `everything`, of which the share `good` can be decoded."""
    keys, groups = everything.keys, split_numbers(everything.keys, table)
    is_padded = result.costs.padded > result.costs.positions
    totals = {"states": 0.0, "positions": 0.0, "padded": 0.0}
    sampled = dict(totals)
    nbytes = [0] * len(part.encode.cuts)
    wanted = rows_to_encode(part, everything, table)
    for of_view, all_rows, own in zip(opened.stores, wanted, rows_to_encode(part, result.keyed, table), strict=True):
        units, tried = (units_of(rows, keys, groups, part.encode.segment_samples) for rows in (all_rows, own))
        for of, into in ((units, totals), (tried, sampled)):
            into["states"] += sum(map(len, of))
            into["positions"] += (positions := float(sum(lengths[unit].sum() for unit in of)))
            into["padded"] += padded_positions(of, lengths, part.encode) if is_padded else positions
        held = float(sum(lengths[unit].sum() for unit in tried))
        for cut, store in enumerate(of_view):
            nbytes[cut] += projected_nbytes(
                store,
                held,
                segments=len(units),
                samples=round(good * sum(map(len, units))),
                to_positions=good * float(sum(lengths[unit].sum() for unit in units)),
            )
    states = good * totals["states"]
    per_state = {name: (totals[name] / totals["states"]) / (sampled[name] / sampled["states"]) for name in sampled}
    return EncodeTrial(
        part,
        opened.stores,
        [prefix.cut.share for prefix in opened.prefixes],
        result,
        lengths,
        round(states),
        per_state["padded"],
        per_state["positions"],
        nbytes,
    )


class _Counted:
    """The batches of a loader, which adds up their positions, padding included."""

    def __init__(self, batches: Batches, lengths: np.ndarray, encoders: np.ndarray) -> None:
        self.batches, self.lengths, self.encoders = batches, lengths, encoders
        self.positions = 0

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        self.batches.set_epoch(epoch, start, end)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.positions += batch_positions(batch.rows.numpy(), self.lengths, self.encoders)
            yield batch


@dataclass(frozen=True)
class _Epochs:
    """Training steps from the stores of the sample, scaled to an epoch of the data set."""

    project: Project
    table: SampleTable
    """The samples that a run would have."""
    sample: np.ndarray
    """Those of its rows that are stored, ascending."""
    keyed: KeyedSamples
    tried: Sequence[EncodeTrial]
    planned: Project
    """The project as it is; `project` has its files in another folder, and trains longer than needed."""

    @property
    def per_run(self) -> float:
        """Epochs of a run, as params.yaml has them."""
        return (
            self.planned.train.max_steps / self._real[0] if self.planned.train.max_steps else self.planned.train.epochs
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the stores of all cuts; that of an encoder with a cut of its own counts once."""
        places = {(part, part.number(cut)): cut for part in self.tried for cut in self.planned.encode.cuts}
        suffix = self.planned.encode.suffix
        return sum(
            part.nbytes[number] + part.beside_bytes(cut, suffix=suffix) for (part, number), cut in places.items()
        )

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of each row of the table, and the number of the encoder that has it, (N,) int64 each."""
        rows = KeySet(self.keyed.keys).find(self.table.keys)
        encoders = np.zeros(len(rows), np.int64)
        for number, part in enumerate(self.tried[1:], start=1):
            encoders[self.table.targets["role"] == part.project.tower] = number
        return np.stack([part.lengths[rows] for part in self.tried])[encoders, np.arange(len(rows))], encoders

    @cached_property
    def _real(self) -> tuple[int, int]:
        """Batches and positions of an epoch of the data set."""
        return epoch_positions(open_task(self.project.task), self.table, self.project.train, *self._lengths)

    def forecasts(self, deadline: float) -> list[CutForecast]:
        """Return the predicted costs of all cuts, in their order; the cheapest trainings are tried first."""
        found = [
            self._forecast(cut, deadline) for cut in sorted(self.project.encode.cuts, key=self._share, reverse=True)
        ]
        return sorted(found, key=lambda one: self.project.encode.cuts.index(one.cut))

    def _share(self, cut: CutName) -> float:
        """Return the share of the blocks before a cut, the smallest of all encoders."""
        return min(part.shares[part.number(cut)] for part in self.tried)

    def _forecast(self, cut: CutName, deadline: float) -> CutForecast:
        """Return the predicted costs of one cut."""
        release_freed_memory()
        epoch: float | None = None
        reason: str | None = "the time was up before its training was tried"
        if time.monotonic() < deadline:
            try:
                epoch, reason = self._epoch_seconds(cut), None
            except (RecyclingError, RuntimeError, ValueError) as error:  # of the network's own code, too
                reason = f"training cannot be tried on the sample: {error}"
        encode = frozen = 0.0
        for number, part in enumerate(self.tried):
            seconds, own = part.seconds(cut), self._lengths[1] == number
            encode += sum(seconds.values()) * part.states
            frozen += seconds["forward"] * int((own & (self.table.split == "train")).sum())
        return CutForecast(
            cut=cut,
            recycled=self._share(cut),
            samples=len(first_rows(self.keyed.keys[self.keyed.good])),
            state_bytes=sum(part.nbytes[part.number(cut)] for part in self.tried),
            beside_bytes=sum(part.beside_bytes(cut, suffix=self.planned.encode.suffix) for part in self.tried),
            encode_seconds=encode,
            frozen_seconds=frozen,
            epoch_seconds=epoch,
            reason=reason,
        )

    def _epoch_seconds(self, cut: CutName) -> float:
        """Time steps of training after `cut`, and return the seconds of an epoch of the data set."""
        config = self.project.train
        accelerator = open_accelerator(config, self.project.work_dir / "logs")
        opened = OpenCut.of(self.project, cut, self.sample)
        towers = opened.towers_for(self.project)
        suffix, (training, *_) = open_suffix(opened, towers, config, accelerator.device)
        if config.compile:
            suffix.compile()
        lengths, encoders = (of[self.sample] for of in self._lengths)
        counted, rounds = _Counted(training, lengths, encoders), Rounds.of(config, len(training))
        objective = Objective(suffix, towers[0].loaded.task)
        model = prepare(objective, training, accelerator)
        optimizer = open_optimizer(objective, config, new_parameters(towers))
        optimizer, scheduler = accelerator.prepare(optimizer, schedule(optimizer, config, rounds.steps))
        step = partial(train_round, model, counted, optimizer, scheduler, accelerator, config)
        each = step(replace(rounds, steps_per_round=1), 0)["train/seconds"]  # the first prepares kernels and memory
        at_once = int(np.clip(TRAIN_SECONDS / 4 / each, 1, rounds.steps_per_epoch))
        rates = list[float]()
        end = time.monotonic() + TRAIN_SECONDS
        while not rates or time.monotonic() < end:
            counted.positions = 0
            seconds = step(replace(rounds, steps_per_round=at_once), len(rates) + 1)["train/seconds"]
            rates.append(seconds / counted.positions)
        return statistics.median(rates) * self._real[1]

    def codecs(self, deadline: float) -> tuple[list[dict[str, Any]], str]:
        """Return the errors of each codec in the states of the cut that takes most bytes, and the name of that cut."""
        part = self.tried[0]
        cuts = [cut for cut in self.project.encode.cuts if part.shares[part.number(cut)]]
        if not cuts or time.monotonic() > deadline:
            return [], ""
        cut = max(cuts, key=lambda cut: part.nbytes[part.number(cut)])
        tower = open_tower(part.project, cut, self.table, suffix_only=True, sample=self.sample)
        report = compare(tower, part.project.store_name(cut), CODEC_SAMPLES)
        return [asdict(one) for one in report.deviations], report.cut


def _limits(project: Project) -> list[str]:
    """Return what the predictions leave out under these settings."""
    found = []
    if project.encode.store is not None:
        found.append("the store is remote: its disk and the time of transfers are not measured; writing is local here")
    if not project.encode.executor.is_here:
        found.append("encode seconds are those of one process on this machine, without encode.executor")
    return found
