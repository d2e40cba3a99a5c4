"""A finished run -> the full fine-tuned model, in the form its library reads, proved against the cached path."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data import SampleTable
from pipeline.encode.ragged import Sample, pad_batch
from pipeline.errors import ConfigError, DataError, RecyclingError
from pipeline.files import open_to_others
from pipeline.models import loading_code, network_inputs
from pipeline.precision import widen
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.project.views import Views
from pipeline.runs.finished import open_run, towers_of
from pipeline.runs.record import read_run
from pipeline.split import Prefix, Suffix, merge
from pipeline.tasks import read_tensor
from pipeline.train.adapter_files import inject_adapter, save_adapter

LOADER = "load.py"
"""File in an export with the lines of Python that load it."""
PROVED_ON = 32
MERGED_TOLERANCE = 1e-5
"""Largest difference of the merged model from prefix + suffix in fp32, relative to the largest output."""
STORED_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""The same from the suffix on stored states, by the types that states are computed and stored in."""


class ParityError(RecyclingError):
    """The exported model does not give the outputs of the cached path."""


@dataclass(frozen=True)
class Parity:
    """Differences of the exported model from the cached path on some samples."""

    samples: int
    merged: float
    """Largest output difference to prefix + suffix, relative to the largest output."""
    stored: float
    """Largest output difference to the suffix on stored states, relative to the largest output."""
    agreement: float
    """Share of samples, or of tokens that have outputs, whose largest output is the same."""

    @classmethod
    def worst(cls, parities: "Sequence[Parity]") -> "Parity":
        """Return the worst figures of several models."""
        return cls(
            samples=sum(one.samples for one in parities),
            merged=max(one.merged for one in parities),
            stored=max(one.stored for one in parities),
            agreement=min(one.agreement for one in parities),
        )

    def __str__(self) -> str:
        return (
            f"{self.samples} samples: outputs within {self.merged:.1e} of prefix + suffix and {self.stored:.1e} of the "
            f"cached path (relative); {self.agreement:.0%} agree on the largest output"
        )


def export_adapter(project: Project, name: str, to: Path) -> float:
    """Write the LoRA adapters of the finished run `name` to the folder `to` as peft's files.

    Returns the largest difference of the outputs of the pretrained network with them from those of prefix + suffix,
    relative to the largest output, on some samples.

    Raises:
        ConfigError: the run trained no LoRA adapter of a single network of transformers.
        DataError, ParityError: as `export_run`.
    """
    _check_new(to)
    of_run = project.overridden(read_run(project, name).overrides)
    config = of_run.train.adapter
    if config is None or config.kind != "lora" or of_run.model.library != "hf" or of_run.towers.is_set:
        raise ConfigError(
            f"run {name}: --adapter takes a run of one hf: network with train.adapter: lora; here are "
            f"model.backbone {of_run.model.backbone} and train.adapter {config and config.kind}; export it whole"
        )
    run = open_run(project, name)
    loaded, network = run.loaded, run.loaded.backbone.network
    own = {id(item): name for name, item in widen(loaded.backbone.model).named_parameters()}
    contents, _ = _samples(loaded, run.store, run.table)
    batch = network_inputs(pad_batch(contents, loaded.backbone.preprocess.pad))
    kept = run.suffix.state_dict()
    trained = {name: kept[own[id(item)]] for name, item in network.named_parameters() if own.get(id(item)) in kept}
    with torch.no_grad():
        live = read_tensor(run.suffix.eval()(run.prefix(**batch), **batch))
        adapted = inject_adapter(network, trained, config.rank)
        full = read_tensor(loaded.backbone.model.eval()(**batch))
    difference = float((full - live).abs().max() / live.abs().max().clamp(min=1e-12))
    if difference > MERGED_TOLERANCE:
        raise ParityError(
            f"run {name}: with its adapters the network's outputs are {difference:.1e} from those of the run (bound "
            f"{MERGED_TOLERANCE}); nothing was exported; export it whole"
        )
    with _new_folder(to) as beside:
        beside.mkdir(parents=True)
        save_adapter(adapted, beside)
        open_to_others(beside)
    return difference


def export_run(project: Project, name: str, to: Path) -> Parity:
    """Write the finished run `name` to the folder `to` and return the proof that it is what was trained.

    `to` appears only once the proof has passed. `legend.json` in it says what the outputs mean, as the run does, and
    `load.py` loads it without this package. Towers are written to folders in it, each with its proof.

    Raises:
        DataError: the run does not exist, or the samples of its store are not in the data set any more.
        ParityError: the full model's outputs differ from the cached path's.
    """
    _check_new(to)
    with _new_folder(to) as beside:
        parities = [_export(project, name, tower, beside / (tower or "")) for tower in towers_of(project, name)]
    return Parity.worst(parities)


def _check_new(to: Path) -> None:
    if to.exists() and any(to.iterdir()):
        raise DataError(f"{to} is not empty; name a new folder, an export overwrites nothing")


@contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """Give the path of a folder beside `to`, which becomes `to` at the end, unless there is an error."""
    beside = to.with_name(f".{to.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    yield beside
    if to.exists():
        to.rmdir()
    beside.rename(to)


def _export(project: Project, name: str, tower: str | None, to: Path) -> Parity:
    """Write one encoder of a run to the new folder `to`."""
    run = open_run(project, name, tower)
    loaded, store, table = run.loaded, run.store, run.table
    widen(loaded.backbone.model)  # what was trained is in float32
    contents, rows = _samples(loaded, store, table)
    outputs = _outputs(loaded, store, run.prefix, run.suffix, contents, rows)
    parity = _compare(*outputs)
    bound = max(STORED_TOLERANCE[name] for name in (loaded.project.encode.dtype, store.plain.recipe.compute_dtype))
    if parity.merged > MERGED_TOLERANCE or parity.stored > bound:
        raise ParityError(
            f"run {name}: the full model's outputs are {parity.merged:.1e} from prefix + suffix (bound "
            f"{MERGED_TOLERANCE}) and {parity.stored:.1e} from the cached path (bound {bound}); nothing was exported"
        )
    to.mkdir(parents=True)
    loaded.backbone.save(to)
    code = loading_code(loaded.project.model, loaded.head, loaded.backbone)
    (to / LOADER).write_text(code, encoding="utf-8")
    open_to_others(to)
    (to / "parity.json").write_text(json.dumps(asdict(parity), indent=2) + "\n")
    if run.legend:
        (to / "legend.json").write_text(json.dumps(run.legend, ensure_ascii=False) + "\n", encoding="utf-8")
    return parity


def _samples(loaded: LoadedModel, store: Views, table: SampleTable) -> tuple[list[Sample], np.ndarray]:
    """Return some samples of the data set as they are stored, and their rows in the sample table; held-out ones first.

    Where there are augmented views, a training sample is taken in the first of them.
    """
    plain, first = loaded.preprocess(None), loaded.preprocess(0 if loaded.project.encode.views else None)
    source = loaded.project.source()
    row_of = {key.tobytes(): row for row, key in enumerate(table.keys)}
    wanted = {
        table.source[row]
        for row in np.concatenate([table.rows(s) for s in ("validation", "test", "train")])[:PROVED_ON]
    }
    samples, rows = [], []
    for i in range(len(source)):
        if source.row(i).source in wanted:
            content = source.content(i)
            row = row_of.get(source.key(i, content))
            if row is not None:
                samples.append((first if store.in_views[row] else plain)(content))
                rows.append(row)
    if not samples:
        raise DataError(
            "no sample of the store is in the data set any more, so the export cannot be proved; run dvc repro"
        )
    return samples[:PROVED_ON], np.asarray(rows[:PROVED_ON])


def _outputs(
    loaded: LoadedModel,
    store: Views,
    prefix: Prefix,
    suffix: Suffix,
    samples: list[Sample],
    rows: np.ndarray,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the outputs (B, ...) of the full model, of prefix + suffix, and of the suffix on stored states one by one.

    The model is merged in place, after everything that needs the prefix has run.
    """
    batch = network_inputs(pad_batch(samples, loaded.backbone.preprocess.pad))
    suffix.eval()
    with torch.no_grad():
        live = read_tensor(suffix(prefix(**batch), **batch))
        cached = [_cached(loaded, store, suffix, rows[i : i + 1]) for i in range(len(rows))]
        full = read_tensor(merge(loaded.backbone.model, suffix).eval()(**batch))
    return full, live, cached


def _cached(loaded: LoadedModel, store: Views, suffix: Suffix, row: np.ndarray) -> Tensor:
    batch = loaded.stored_batch(store, row)
    return read_tensor(suffix(batch.state, **batch.inputs))[0]


def _compare(full: Tensor, live: Tensor, cached: list[Tensor]) -> Parity:
    """Compare outputs; padded outputs are compared up to the length of each sample."""
    scale = full.abs().max().clamp(min=1e-12)
    pairs = [(whole[tuple(map(slice, single.shape))], single) for whole, single in zip(full, cached, strict=True)]
    return Parity(
        samples=len(full),
        merged=float((full - live).abs().max() / scale),
        stored=max(float((whole - single).abs().max() / scale) for whole, single in pairs),
        agreement=float(torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs]).float().mean()),
    )
