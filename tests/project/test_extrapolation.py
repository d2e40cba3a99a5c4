"""Figures of a data set from those of a sample."""

import numpy as np
import torch

from pipeline.encode.config import EncodeConfig
from pipeline.encode.ragged import batches_by_length
from pipeline.encode.unit import plan
from pipeline.project.extrapolation import (
    batch_positions,
    batches_of,
    padded_positions,
    predict_lengths,
    units_of,
)


def test_batches_are_those_of_an_encode() -> None:
    rng = np.random.default_rng(0)
    for lengths in (rng.integers(1, 40, 100), np.array([7]), np.full(16, 3)):
        samples = [{"ids": torch.zeros(n)} for n in lengths.tolist()]
        for size, tokens in ((8, None), (64, None), (8, 50), (1, 1000)):
            real = batches_by_length(samples, size=size, tokens=tokens, pads=True)
            expected = [(len(batch), len(batch) * max(int(lengths[i]) for i in batch)) for batch in real]
            assert list(batches_of(lengths, EncodeConfig(cuts=[1.0], batch_size=size, batch_tokens=tokens))) == expected


def test_units_are_those_of_an_encode() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (50, 16), np.uint8)
    keys[7] = keys[3]
    groups, rows = rng.integers(0, 2, 50), np.arange(2, 50)

    class Empty:
        def missing(self, keys: np.ndarray) -> np.ndarray:
            return np.ones(len(keys), bool)

        def set_aside(self) -> np.ndarray:
            return np.empty((0, 16), np.uint8)

    real = plan(keys, [rows], [[Empty()]], 8, groups)  # type: ignore[list-item]
    found = units_of(rows, keys, groups, 8)
    assert sorted(map(tuple, found)) == sorted(tuple(unit.rows) for unit in real)


def test_lengths_are_those_of_samples_as_large() -> None:
    sizes = np.array([10, 100, 12, 55, 1000, 57])
    assert predict_lengths(sizes, np.array([0, 1, 3]), [2, 20, 11]).tolist() == [2, 20, 2, 11, 20, 11]


def test_padding_of_many_units_is_that_of_some() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 40_000)
    units = np.arange(40_000).reshape(-1, 50)
    batching = EncodeConfig(cuts=[1.0], batch_size=8)
    exact = sum(positions for unit in units for _, positions in batches_of(lengths[unit], batching))
    assert abs(padded_positions(list(units), lengths, batching) / exact - 1) < 0.01


def test_each_encoder_pads_its_own_samples() -> None:
    lengths, encoders = np.array([3, 5, 10, 2]), np.array([0, 0, 1, 1])
    assert batch_positions(np.arange(4), lengths, encoders) == 2 * 5 + 2 * 10
