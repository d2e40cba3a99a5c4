"""The error of each codec: in the states of some samples, and in the outputs of the layers after the cut.

N samples, B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.data import SampleTable
from pipeline.device import pick_device
from pipeline.encode.ragged import Sample, pad_batch
from pipeline.errors import DataError
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.project.towers import Tower, load_weights, open_tower
from pipeline.runs.record import WEIGHTS
from pipeline.split import Suffix
from pipeline.store import CODECS, STATE_PREFIX, Reader, Rows, format_bytes, round_trip
from pipeline.tasks import read_tensor
from pipeline.train.loader import Loader, StoredRows

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class CodecDeviation:
    """Size and error of one codec.

    Attributes:
        storage: codec and dtype, `int8:float16`.
        bytes: of one sample, all its tensors, without metadata.
        state_largest: largest deviation of a state, relative to the largest value of its tensor.
        state_mean: mean deviation relative to the mean magnitude.
        output_largest: largest deviation of an output.
        output_mean: mean deviation of outputs, relative to their standard deviation.
        changed: share of outputs whose largest class, or nearest neighbour among the N, is another one; of a language
            model, share of the tokens trained on that are the likeliest before or after, and not both.
    """

    storage: str
    bytes: float
    state_largest: float
    state_mean: float
    output_largest: float
    output_mean: float
    changed: float


@dataclass(frozen=True)
class CodecReport:
    """Errors of all codecs, relative to the current content of a store."""

    cut: str
    samples: int
    storage: str
    kind: str
    """Kind of the outputs, as `Head.kind`."""
    is_trained: bool
    """Whether the weights after the cut are those of a finished run."""
    deviations: list[CodecDeviation]


class _InMemory:
    """Samples in memory, with the interface of a reader."""

    def __init__(self, places: Rows, samples: Mapping[str, Sequence[Tensor]]) -> None:
        self._number = {place: i for i, place in enumerate(_places(places))}
        self._samples = samples

    def gather(self, rows: Rows, pad: Mapping[str, float] | None = None, *, pin: bool = False) -> dict[str, Tensor]:
        numbers = [self._number[place] for place in _places(rows)]
        chosen: list[Sample] = [{name: own[i] for name, own in self._samples.items()} for i in numbers]
        batch = pad_batch(chosen, pad or {})
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch


def measure(project: Project, name: str, count: int, tower: str | None = None) -> CodecReport:
    """Apply every codec to `count` samples of a cut's store, drawn from the sample table; nothing is written.

    With towers, `tower` is the role of the encoder.

    Memory: the states of these samples, three times in float32.

    Raises:
        ConfigError: no such cut or tower, or it was never encoded.
        MissingKeysError: a sample of the table is not in the store.
        DataError: the finished run does not fit the model.
    """
    opened = open_tower(project.part(tower), project.cut(name), SampleTable.read(project.samples), suffix_only=True)
    is_trained = _load_run(project, name, opened)
    label = "/".join(filter(None, [name, tower]))
    return compare(opened, label, count, is_trained=is_trained)


def compare(tower: Tower, label: str, count: int, *, is_trained: bool = False) -> CodecReport:
    """Apply every codec to `count` samples of `tower`, which the report calls `label`; as `measure`."""
    loaded, store, suffix = tower.loaded, tower.store, tower.suffix
    suffix.to(pick_device(loaded.project.encode.device)).eval()
    drawn = np.sort(np.random.default_rng(0).permutation(len(tower.table))[:count])
    places = store.first_places(drawn)
    stored = _read(partial(loaded.project.reader, store.path), places)
    kind = loaded.head.kind

    def outputs(samples: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        return _outputs(loaded, places, suffix, samples)

    now = outputs(stored)
    deviations, own_storage = [], loaded.project.storage
    for storage in _storages(own_storage):
        tried, nbytes = dict[str, list[Tensor]](), 0
        for tensor, own in stored.items():
            tried[tensor], size = round_trip(tensor, own, storage)
            nbytes += size
        largest, mean = compare_states(stored, tried)
        deviations.append(
            CodecDeviation(storage, nbytes / len(drawn), largest, mean, *compare_outputs(now, outputs(tried), kind))
        )
    return CodecReport(label, len(drawn), own_storage, kind, is_trained, deviations)


def table(report: CodecReport) -> str:
    """Return the report as text."""
    codec, _, dtype = report.storage.partition(":")
    lost = {"float32": "those the prefix gave"}.get(dtype, f"already rounded to {dtype}")
    if not CODECS[codec].is_lossless:
        lost = f"already rounded to {codec}"
    weights = "a finished run" if report.is_trained else "pretrained layers and an untrained head: train first for more"
    changed = {"embedding": "neighbour changed", "span": "place changed", "language": "hit changed"}.get(
        report.kind, "class changed"
    )
    lines = [
        f"cut {report.cut}: {report.samples:,} samples; deviations from the values in the store ({report.storage}), "
        f"{lost}",
        f"outputs of {weights}",
        f"{'':<22}{'bytes':>10}  {'state: largest':>14}{'mean':>10}  {'output: largest':>15}{'mean':>10}  {changed}",
    ]
    for one in report.deviations:
        mark = "*" if one.storage == report.storage else " "
        lines.append(
            f"{mark} {one.storage:<20}{format_bytes(one.bytes):>10}  {one.state_largest:>14.1e}"
            f"{one.state_mean:>10.1e}  {one.output_largest:>15.1e}{one.output_mean:>10.1e}  {one.changed:.1%}"
        )
    lines.append(
        "* the store's. Of states, relative to the largest and the mean magnitude; of outputs, absolute and relative"
    )
    lines.append("their standard deviation.")
    return "\n".join(lines) + "\n"


def _storages(own: str) -> list[str]:
    """Return all dtypes uncompressed, and the other codecs in the dtype of the store."""
    dtype = own.partition(":")[2]
    return [*(f"raw:{other}" for other in DTYPES), *(f"{codec}:{dtype}" for codec in CODECS if codec != "raw")]


def _load_run(project: Project, name: str, tower: Tower) -> bool:
    weights = project.run_path(name) / WEIGHTS
    if not weights.exists():
        return False
    try:
        load_weights(tower, weights)
    except RuntimeError as error:
        raise DataError(f"{weights} does not fit the model of params.yaml; train again, or remove it") from error
    return True


def _read(opened: Callable[[], Reader], places: Rows) -> dict[str, list[Tensor]]:
    """Return the samples at N places by tensor name, each N tensors; at most one segment is open at a time."""
    found: dict[str, list[Tensor]] = {}
    samples: list[dict[str, Tensor]] = [{} for _ in range(len(places))]
    for number in np.unique(places.segment):
        reader, segment = opened(), places.segments[number]
        here = np.flatnonzero(places.segment == number)
        reader.check(segment, places.row[here])
        for i in here.tolist():
            tensors = reader.segment(segment).tensors
            samples[i] = {name: tensor.sample(int(places.row[i])).clone() for name, tensor in tensors.items()}
    for sample in samples:
        for name, value in sample.items():
            found.setdefault(name, []).append(value)
    return found


def _outputs(
    loaded: LoadedModel, places: Rows, suffix: Suffix, samples: Mapping[str, Sequence[Tensor]]
) -> list[Tensor]:
    """Return the outputs of the samples at `places` batch by batch, fp32 on the CPU; always in the same order."""
    size = loaded.project.encode.batch_size
    loader = Loader(
        StoredRows(places, _InMemory(places, samples)),
        {},
        [np.arange(begin, min(begin + size, len(places))) for begin in range(0, len(places), size)],
        pad=loaded.backbone.preprocess.pad,
        device=pick_device(loaded.project.encode.device),
    )
    with torch.no_grad():
        return [read_tensor(suffix(batch.state, **batch.inputs)).float().cpu() for batch in loader]


def compare_states(stored: Mapping[str, list[Tensor]], tried: Mapping[str, list[Tensor]]) -> tuple[float, float]:
    """Return the largest and the mean relative deviation, of the state tensor where each is largest."""
    largest = mean = 0.0
    for name, own in stored.items():
        if name.startswith(STATE_PREFIX):
            before = torch.cat([one.flatten() for one in own]).float()
            moved = torch.cat([one.flatten() for one in tried[name]]).float().sub_(before).abs_()
            largest = max(largest, _ratio(moved.max(), before.abs().max()))
            mean = max(mean, _ratio(moved.mean(), before.abs().mean()))
    return largest, mean


def compare_outputs(before: list[Tensor], after: list[Tensor], kind: str) -> tuple[float, float, float]:
    """Return the largest and the mean deviation of outputs, and the share that changed, as in `CodecDeviation`."""
    if kind == "language":  # (B, T, 3): loss, distance of the token's logit to the largest, whether it counts
        before, after = ([one[one[..., 2] > 0][:, :2] for one in outputs] for outputs in (before, after))
    flat = torch.cat([one.flatten() for one in before])
    moved = torch.cat([one.flatten() for one in after]).sub(flat).abs_()
    if kind == "embedding":
        changed = _nearest(torch.cat(before)) != _nearest(torch.cat(after))
    elif kind == "language":
        changed = (torch.cat(before)[:, 1] == 0) != (torch.cat(after)[:, 1] == 0)
    else:
        changed = torch.cat([(a.argmax(-1) != b.argmax(-1)).flatten() for a, b in zip(before, after, strict=True)])
    return float(moved.max()), _ratio(moved.mean(), flat.std()), float(changed.float().mean())


def _nearest(vectors_ND: Tensor) -> Tensor:
    """Return the index of the nearest other vector by cosine."""
    unit_ND = torch.nn.functional.normalize(vectors_ND, dim=-1)
    return (unit_ND @ unit_ND.T).fill_diagonal_(-torch.inf).argmax(-1)


def _ratio(value: Tensor, scale: Tensor) -> float:
    return float(value / scale) if float(scale) > 0 else float(value)


def _places(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.segment.tolist(), rows.row.tolist(), strict=True))
