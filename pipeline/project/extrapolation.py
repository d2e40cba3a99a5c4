"""From figures of a sample to those of a data set: which samples, how long all are, in what segments and batches.

N samples of the data set. A position is a token of a text, or what `ragged.length` counts; samples that all have one
shape count as one position each.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data import SPLITS, SampleTable
from pipeline.encode.config import EncodeConfig
from pipeline.encode.ragged import divide_lengths
from pipeline.project.loaders import Schedule
from pipeline.store import first_rows
from pipeline.tasks import Task
from pipeline.train.config import TrainConfig

SEED = 0
SIMULATED_UNITS = 200
"""Units whose batches are counted one by one; of more, that many stand for all."""


def choose_rows(task: Task, table: SampleTable, config: TrainConfig, count: int) -> np.ndarray:
    """Return about `count` rows of `table`, ascending, drawn in units of the task and from each split by its share.

    The training split gives whole batches, one at least.
    """
    rng, rows = np.random.default_rng(SEED), list[np.ndarray]()
    for split in SPLITS:
        units = task.units(table, split, seed=config.seed, epoch=0)
        if not len(units):
            continue
        per_unit = np.mean([np.size(unit) for unit in units])
        wanted = round(count * float((table.split == split).mean()) / per_unit)
        if split == "train":
            wanted = config.batch_size * max(1, round(wanted / config.batch_size))
        chosen = rng.permutation(len(units))[: max(1, wanted)]
        rows += [np.atleast_1d(units[number]) for number in chosen.tolist()]
    return np.unique(np.concatenate(rows))


def predict_lengths(sizes: np.ndarray, rows: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Return the positions of N samples, (N,) int64: of `rows` (n,) these `lengths`, of others those of one as large.

    `sizes` (N,) are those of the contents, which `rows` are compared by.
    """
    by_size = np.argsort(sizes[rows], kind="stable")
    known, values = sizes[rows][by_size], np.asarray(lengths)[by_size]
    predicted = values[np.searchsorted((known[1:] + known[:-1]) / 2, sizes)]
    predicted[rows] = lengths
    return predicted


def units_of(rows: np.ndarray, keys: np.ndarray, groups: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the rows of each unit that an encode of `rows` (n,) into empty stores has, as `unit.plan` divides them.

    `keys` (N, 16) uint8 and `groups` (N,) are those of all rows.
    """
    units = []
    for group in np.unique(groups[rows]):
        own = rows[groups[rows] == group]
        own = own[first_rows(keys[own])]
        units += [own[begin : begin + size] for begin in range(0, len(own), size)]
    return units


def batches_of(lengths: np.ndarray, encode: EncodeConfig) -> Iterator[tuple[int, int]]:
    """Yield the number of samples and of positions, padding included, of the batches of a unit, as in encode."""
    ascending = np.sort(lengths).tolist()
    for part in divide_lengths(ascending, size=encode.batch_size, tokens=encode.batch_tokens):
        count = part.stop - part.start
        yield count, count * ascending[part.stop - 1]


def padded_positions(units: Sequence[np.ndarray], lengths: np.ndarray, encode: EncodeConfig) -> float:
    """Return the positions that the prefix computes for `units` of rows, padding included."""
    some = units[:: max(1, len(units) // SIMULATED_UNITS)]
    counted = sum(positions for unit in some for _, positions in batches_of(lengths[unit], encode))
    return counted * sum(map(len, units)) / max(1, sum(map(len, some)))


def batch_positions(rows: np.ndarray, lengths: np.ndarray, encoders: np.ndarray) -> int:
    """Return the positions of a training batch of `rows`, padding included; each of several encoders pads its own.

    `lengths` (N,) are those of the rows of the table, `encoders` (N,) the number of the encoder that has each.
    """
    own = [lengths[rows[encoders[rows] == number]] for number in np.unique(encoders[rows])]
    return sum(len(of) * int(of.max()) for of in own)


def epoch_positions(
    task: Task, table: SampleTable, config: TrainConfig, lengths: np.ndarray, encoders: np.ndarray
) -> tuple[int, int]:
    """Return the batches of an epoch of training and their positions, padding included; arguments as above."""
    sizes = lengths if config.group_by_length else None
    schedule = Schedule(config, task, table, None, np.zeros(len(table), np.int64), sizes, 0, 1, 1)
    batches = schedule.batches("train", 0)
    return len(batches), sum(batch_positions(rows, lengths, encoders) for rows in batches)
