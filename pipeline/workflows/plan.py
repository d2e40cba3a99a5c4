"""Plan: data, settings and cuts tried on a sample -> predicted costs, verdicts, recommended settings.

What is predicted runs the code of `recycle encode` and `recycle train` on some hundred samples, in a temporary folder.
"""

import io
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.util import load_yaml_guess_indent

from pipeline.config import set_values
from pipeline.data import SPLITS, SampleTable, Source, remarks, rows_in_role
from pipeline.encode import quarantine
from pipeline.encode.keying import KeyedSamples
from pipeline.files import write_whole
from pipeline.keys import JSON, digest
from pipeline.memory import release_freed_memory
from pipeline.project import CutName, Project, recipe_cache
from pipeline.project.extrapolation import SEED, units_of
from pipeline.project.views import split_numbers
from pipeline.report.forecast import settings_digest, write_plan
from pipeline.store import sweep
from pipeline.workflows.trials.cuts import CutTrials, measure_cuts
from pipeline.workflows.trials.network import TrialNetwork
from pipeline.workflows.trials.settings import SettingTrials, Trials, measure_settings, with_batches

T = TypeVar("T")

SECONDS = 50.0
"""Time after which nothing more is tried."""
SETTING_SHARE = 0.5
"""Share of that time after which no setting is tried."""
SETTING_SAMPLES = 128
LABELS = ("label", "tags", "group")
OTHER_STORES = (
    "there are stores of the present settings; with another precision, encode refuses them until they are replaced: "
    "recycle encode --replace"
)
FOLDER = "plan"
"""Folder in `work_dir` with what was measured, by a digest of everything that it depends on."""


@dataclass(frozen=True)
class DataSummary:
    """The data set in figures."""

    samples: int
    splits: dict[str, int]
    labels: dict[str, int]
    """Number of distinct labels (tags, pairs, groups) by the name of the target."""
    remarks: list[str]
    """Duplicates across splits, contents under several labels, files left out."""
    unreadable: str = ""
    """Counts of what cannot be read, by reason, each with its first sample."""


@dataclass(frozen=True)
class Plan:
    """What `recycle plan` found."""

    data: DataSummary
    settings: SettingTrials
    cuts: CutTrials
    free_bytes: int | None
    """Free disk where the stores will be; None where they are remote."""
    seconds: float
    """Time that the command took."""


def plan_project(project: Project, *, apply: bool = False) -> Plan:
    """Measure on a sample what an encode and runs of every cut will cost; write results/plan.json, and no state.

    What was measured before under the same settings is not measured again. With `apply`, the recommended settings are
    written to params.yaml, and the costs are predicted for them.

    Raises:
        DataError: the data cannot be read as described.
    """
    began = time.monotonic()
    project.work_dir.mkdir(parents=True, exist_ok=True)
    sweep(project.work_dir)  # of a plan that was killed
    source = project.source()
    keyed = project.keys_of(source)
    table = project.sample_table(source, keyed)
    with _quiet():
        settings = _settings(project, source, keyed, table, began)
        release_freed_memory()
        settings = replace(settings, recommended=_changes(project, settings.recommended))
        if settings.recommended and any(part.store_path(part.at(cut)).exists() for part, cut in _stores(project)):
            settings = replace(settings, notes=[*settings.notes, OTHER_STORES])
        chosen = project.overridden({**project.overrides, **settings.recommended}) if apply else project
        rate = settings.recommended_rate if apply else settings.rate
        cuts = _cuts(chosen, source, keyed, table, rate, settings.state_bytes, began)
    data = _summary(source, keyed, table, cuts)
    plan = Plan(data, settings, cuts, _free_bytes(project), time.monotonic() - began)
    if apply and settings.recommended:
        apply_settings(project.params, settings.recommended)
    write_plan(project, {**asdict(plan), "forecast": asdict(cuts.forecast)})
    return plan


def _settings(project: Project, source: Source, keyed: KeyedSamples, table: SampleTable, began: float) -> SettingTrials:
    """Try settings on some samples, unless that was done; nothing where no cut has a layer before it."""
    file = _file(project, table, "settings", [part.encode.model_dump(mode="json") for part in project.parts])
    if known := _read(file, SettingTrials):
        return known
    rng, networks = np.random.default_rng(SEED), list[TrialNetwork]()
    for part in project.parts:
        own = keyed.good if part.tower is None else rows_in_role(source, keyed.good, part.tower)
        networks.append(TrialNetwork.open(part, source, table, np.sort(rng.permutation(own)[:SETTING_SAMPLES])))
    if not any(network.prefix.cut.share for network in networks):
        return SettingTrials(notes=["no layer lies before the cuts: there is no setting to try"])
    trials = Trials(project, networks, began + SETTING_SHARE * SECONDS)
    first = project.parts[0].tower
    wanted = keyed.good if first is None else rows_in_role(source, keyed.good, first)
    units = partial(units_of, wanted, keyed.keys, split_numbers(keyed.keys, table))
    found = with_batches(trials, measure_settings(trials), units, networks[0].lengths(keyed.sizes))
    if file and time.monotonic() < trials.deadline:
        write_whole(file, json.dumps(asdict(found)) + "\n")
    return found


def _cuts(
    project: Project,
    source: Source,
    keyed: KeyedSamples,
    table: SampleTable,
    rate: float | None,
    state_bytes: int,
    began: float,
) -> CutTrials:
    """Try the cuts on some samples, unless that was done under these settings."""
    file = _file(project, table, "cuts", settings_digest(project))
    if known := _read(file, CutTrials):
        return known
    found = measure_cuts(project, source, keyed, table, rate, state_bytes, began + SECONDS)
    if file and time.monotonic() < began + SECONDS:
        write_whole(file, json.dumps(asdict(found)) + "\n")
    return found


def _file(project: Project, table: SampleTable, what: str, settings: JSON) -> Path | None:
    """Return the file for what was measured under these settings, data, weights and code; None where code is unknown.

    A trial that was cut short is not kept.
    """
    made_of = [recipe_cache.cache_key(part, table) for part in project.parts]
    if None in made_of:  # the user's own code, which may have changed
        return None
    return project.work_dir / FOLDER / f"{digest([what, settings, *made_of])}.json"


def _read(file: Path | None, kind: type[T]) -> T | None:
    try:
        return None if file is None else TypeAdapter(kind).validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log from what happens in a temporary folder."""
    log = logging.getLogger("recycle")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _changes(project: Project, settings: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return those of `settings` that params.yaml has with another value."""

    def current(name: str) -> Any:
        value: Any = project
        for step in name.split("."):
            value = getattr(value, step, None)
        return value

    return {name: value for name, value in settings.items() if value != current(name)}


def _summary(source: Source, keyed: KeyedSamples, table: SampleTable, cuts: CutTrials) -> DataSummary:
    labels = {}
    for name, values in table.targets.items():
        if name in LABELS:
            flat = values if values.dtype.kind != "O" else np.concatenate([np.atleast_1d(one) for one in values])
            labels[name] = len(np.unique(flat))
    notes = [f"left out of the data set: {left_out}"] if (left_out := source.left_out()) else []
    if cuts.cut_off:
        share = cuts.cut_off / max(1, cuts.forecast.samples_tried)
        notes.append(
            f"{share:.1%} of {cuts.forecast.samples_tried} samples tried are longer than preprocess.max_length"
        )
    unreadable = "; ".join(filter(None, [quarantine.summary(keyed.bad), cuts.undecodable]))
    splits = {split: int((table.split == split).sum()) for split in SPLITS if (table.split == split).any()}
    return DataSummary(len(keyed.keys), splits, labels, [*notes, *remarks(table)], unreadable)


def _stores(project: Project) -> Iterator[tuple[Project, CutName]]:
    return ((part, cut) for part in project.parts for cut in project.encode.cuts)


def _free_bytes(project: Project) -> int | None:
    if project.encode.store is not None:
        return None
    place = project.activations.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


class _Representer(RoundTripRepresenter):
    """Writes None as null, not as nothing."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def apply_settings(params: Path, settings: Mapping[str, JSON]) -> None:
    """Replace values of a params.yaml; comments, order and quotes stay."""
    yaml, out = YAML(), io.StringIO()
    yaml.width, yaml.preserve_quotes, yaml.Representer = 4096, True, _Representer
    content, indent, offset = load_yaml_guess_indent(params.read_text(encoding="utf-8"), yaml=yaml)
    set_values(content, settings)
    yaml.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
    yaml.dump(content, out)
    write_whole(params, out.getvalue())
