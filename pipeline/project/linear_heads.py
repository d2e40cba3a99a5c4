"""Linear heads on the states of many cuts, fitted in closed form: what the layers before each cut have made linear.

One pass over some samples serves all cuts. A head reads the mean of a state (of an image, a sound, a text), or each of
its tokens (for tags and answers). It is a linear discriminant analysis of classes, a ridge regression of numbers, and
for embeddings the projection that makes differences within a group equally large in all directions (within-class
covariance normalisation, Hatch et al. 2006).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.encode.decoding import Chunk, decode_rows, finished_samples
from pipeline.encode.encoder import compute_format
from pipeline.encode.ragged import Sample, batches_by_length, pad_batch
from pipeline.errors import ConfigError, DataError
from pipeline.models import EXTRA, network_inputs
from pipeline.project.model_example import ProjectData
from pipeline.split import Capture, Prefix
from pipeline.tasks import IGNORED, Prepared

# B sample of a batch, T token, D channel, K output of a head, L label; a row is a sample or a token

log = logging.getLogger("recycle")

BATCH = 32
MAX_WIDTH = 1024
"""Channels above which features are projected to so many, at random."""
SHRINKAGE = 0.3
"""Penalty, relative to the variance of each channel. Fixed: heads are only compared with each other."""
TINY = 1e-9
"""The same for channels that are constant."""


def score_linear_heads(data: ProjectData, prefixes: Sequence[Prefix], *, samples: int) -> list[float]:
    """Return the validation score of a linear head on the states of each of `prefixes`; NaN where states fit none.

    The score is the task's `monitor`. Heads are fitted on about `samples` training samples, drawn at random in units,
    and scored on half as many validation samples.

    Raises:
        ConfigError: the task has no linear head.
        DataError: no training or no validation sample can be decoded.
    """
    task, head = data.loaded.task, data.loaded.head
    targets = task.prepare(data.table)
    heads = [_LinearHead(per_token=head.kind in ("tokens", "span"), size=head.size) for _ in prefixes]
    run, form = Capture(prefixes), compute_format(prefixes, data.loaded.project.encode)

    def features(split: str, limit: int) -> Iterator[tuple[dict[str, Tensor], list[Tensor | None]]]:
        rows = _draw(task.units(data.table, split), limit, seed=data.loaded.project.data.seed)
        for batch, own in _batches(data, rows, targets, split):
            states = form.run(run, network_inputs(batch))
            yield own, [one.features(state) for one, state in zip(heads, states, strict=True)]

    for own, of_cuts in features("train", samples):
        wanted = task.linear_target(own)
        if wanted is None:
            kind = data.loaded.project.task.kind
            raise ConfigError(f"task.kind is {kind!r}, which has no linear head; leave out --probe")
        for one, values in zip(heads, of_cuts, strict=True):
            one.add(values, wanted)
    for one in heads:
        one.solve()
    scores = [task.metrics() for _ in heads]
    scored = 0
    for own, of_cuts in features("validation", samples // 2):
        scored += len(next(iter(own.values())))
        for one, score, values in zip(heads, scores, of_cuts, strict=True):
            if (output := one(values)) is not None:
                score.update(output.transpose(1, 2) if head.kind == "span" else output, own)
    log.info("linear heads were scored on %d validation samples, of a split of their own", scored)
    return [score.compute()[task.monitor] for score in scores]


def _draw(units: np.ndarray | list[np.ndarray], limit: int, *, seed: int) -> np.ndarray:
    """Return the rows of whole units, drawn at random, as many as have about `limit` rows."""
    rows = sum(map(np.size, units))
    count = len(units) if rows <= limit else max(1, len(units) * limit // rows)
    chosen = np.random.default_rng(seed).permutation(len(units))[:count]
    return np.unique(np.concatenate([np.empty(0, np.int64), *(np.ravel(units[number]) for number in chosen)]))


def _batches(
    data: ProjectData, rows: np.ndarray, targets: Mapping[str, Prepared], split: str
) -> Iterator[tuple[Sample, dict[str, Tensor]]]:
    """Yield batches of samples of equal shapes, so that no mean includes padding, with their targets and extras."""
    preprocess = data.loaded.backbone.preprocess
    (decoded,) = decode_rows(data.source, Chunk(data.rows[rows], [preprocess]))
    good, samples = rows[np.isin(data.rows[rows], decoded.rows)], finished_samples(preprocess, decoded)
    if not samples:
        raise DataError(f"no {split} sample can be decoded, and linear heads need some; see recycle encode")
    batches = list(batches_by_length(samples, size=BATCH, tokens=None, pads=False))
    for numbers in tqdm(batches, desc=f"linear heads, {split}", unit="batch", disable=None, leave=False):
        batch = pad_batch([samples[number] for number in numbers], preprocess.pad)
        own = {name: torch.from_numpy(values[good[numbers]]) for name, values in targets.items()}
        own |= {name.removeprefix(EXTRA): item for name, item in batch.items() if name.startswith(EXTRA)}
        yield batch, own


class _LinearHead:
    """A linear head, fitted to sums over rows, so that memory does not grow with them."""

    def __init__(self, *, per_token: bool, size: int | None) -> None:
        """Make a head for states or for their tokens; `size` is the number of labels, None for embeddings."""
        self._per_token, self._size, self._rows = per_token, size, 0
        self._sums: dict[str, Tensor] = {}
        self._labels: dict[int, tuple[int, Tensor]] = {}
        """Number of rows and their sum (D,), by label."""

    def features(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """Return (B, D) float64 on the CPU, means over all axes but the channels, or (B, T, D); None of other states.

        They are those of the largest tensor of the state.
        """
        values = max((one for one in state.values() if one.is_floating_point()), key=Tensor.numel, default=None)
        if values is None or values.dim() < 2 or (self._per_token and values.dim() != 3):
            return None
        values = values.float().cpu()
        if not self._per_token and values.dim() > 2:
            values = values.movedim(_channel_axis(values.shape), 1).flatten(2).mean(2)
        if values.shape[-1] > MAX_WIDTH:
            draw = torch.Generator().manual_seed(0)
            values = values @ torch.randn(values.shape[-1], MAX_WIDTH, generator=draw) / MAX_WIDTH**0.5
        return values.double().nan_to_num()

    def add(self, values: Tensor | None, wanted: Tensor) -> None:
        """Add the features of a batch and, as `Task.linear_target` has it, what the head should give for them."""
        if values is None:
            return
        is_known = ~wanted.isnan().any(-1) if wanted.is_floating_point() else wanted != IGNORED
        values, wanted = values[is_known], wanted[is_known]
        if wanted.is_floating_point():
            self._add("y", wanted.double().sum(0))
            self._add("xy", values.T @ wanted.double())
        else:
            for label in set(wanted.tolist()):
                members = values[wanted == label]
                count, total = self._labels.get(label, (0, torch.zeros_like(values[0])))
                self._labels[label] = count + len(members), total + members.sum(0)
        self._rows += len(values)
        self._add("x", values.sum(0))
        self._add("xx", values.T @ values)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def solve(self) -> None:
        """Fit the head to what was added; without any row, it gives nothing."""
        if not self._rows:
            return
        mean_D, second_DD = self._sums["x"] / self._rows, self._sums["xx"] / self._rows
        if not self._labels:
            of_target_K = self._sums["y"] / self._rows
            both_DK = self._sums["xy"] / self._rows - mean_D.outer(of_target_K)
            self._weight = torch.linalg.solve(_penalised(second_DD - mean_D.outer(mean_D)), both_DK)
            self._bias = of_target_K - mean_D @ self._weight
            return
        counts, totals = zip(*self._labels.values(), strict=True)
        count_L = torch.tensor(counts, dtype=torch.float64)
        mean_LD = torch.stack(totals) / count_L[:, None]
        within_DD = _penalised(second_DD - (mean_LD * count_L[:, None]).T @ mean_LD / self._rows)
        if self._size is None:
            triangle = torch.linalg.cholesky(within_DD)
            self._weight = torch.linalg.solve_triangular(
                triangle, torch.eye(len(mean_D), dtype=torch.float64), upper=False
            ).T
            self._bias = -mean_D @ self._weight
        else:
            labels = torch.tensor(list(self._labels))
            weight_DL = torch.linalg.solve(within_DD, mean_LD.T)
            self._weight = torch.zeros(len(mean_D), self._size, dtype=torch.float64)
            self._bias = torch.full((self._size,), -torch.inf, dtype=torch.float64)  # of labels that were not drawn
            self._weight[:, labels] = weight_DL
            self._bias[labels] = (count_L / self._rows).log() - (mean_LD * weight_DL.T).sum(1) / 2

    def __call__(self, values: Tensor | None) -> Tensor | None:
        """Return the outputs for features of a batch, (B, K) or (B, T, K) float32."""
        return None if values is None or not self._rows else (values @ self._weight + self._bias).float()


def _penalised(covariance_DD: Tensor) -> Tensor:
    variance_D = covariance_DD.diagonal().clamp(min=0)
    return covariance_DD + (SHRINKAGE * variance_D + TINY * (1 + variance_D.max())).diag()


def _channel_axis(shape: torch.Size) -> int:
    """Return the axis of the channels: of images and videos the one that differs from height and width, else the last.

    Networks keep images as (B, C, H, W) or as (B, H, W, C).
    """
    if len(shape) == 3 or (len(shape) == 4 and shape[1] == shape[2] != shape[3]):
        return len(shape) - 1
    return 1
