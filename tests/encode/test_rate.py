"""The rate of an encode is that of all it did; its share of the machine's peak counts what was computed."""

import pytest
import torch

from pipeline.encode import rate
from pipeline.encode.rate import EncodeRate
from pipeline.encode.unit import EncodeCosts
from pipeline.precision import ComputeFormat

FLOAT32 = ComputeFormat.of(torch.device("cpu"), torch.float32, None, channels_last=False)
TEXTS = [{"ids": torch.ones(length, dtype=torch.int64)} for length in (5, 10)]
IMAGES = [{"x": torch.ones(3, 4, 4)}] * 2
FLOPS = [(1000, 500), (400, 1100)]


@pytest.fixture(autouse=True)
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "matrix_peak", lambda device, dtype: 1e4)


def test_padding_is_computed_but_is_no_token() -> None:
    costs = EncodeCosts(samples=100, positions=600, padded=800, elapsed=10, forward_samples={0: 100, 1: 100})
    found = EncodeRate.of(costs, FLOAT32, FLOPS, TEXTS)
    assert found == EncodeRate(10, 60, pytest.approx(1000 * 80 / 10 / 1e4), "float32")
    assert str(found) == "10.0 samples/s, 60 tokens/s, 80% of the operations per second of a matrix product (float32)"


def test_images_have_no_tokens() -> None:
    costs = EncodeCosts(samples=100, elapsed=20, forward_samples={0: 100, 1: 100})
    assert EncodeRate.of(costs, FLOAT32, FLOPS, IMAGES) == EncodeRate(5, None, pytest.approx(0.5), "float32")


def test_the_share_is_unknown_where_it_cannot_be_told() -> None:
    costs = EncodeCosts(samples=100, elapsed=20, forward_samples={0: 60, 1: 100})
    assert EncodeRate.of(costs, FLOAT32, FLOPS, IMAGES) == EncodeRate(5, None, None, "float32")
    assert EncodeRate.of(costs, FLOAT32, None, IMAGES) == EncodeRate(5, None, None, "float32")
    assert EncodeRate.of(EncodeCosts(samples=9, elapsed=1), FLOAT32, FLOPS, IMAGES) == EncodeRate(
        9, None, None, "float32"
    )
    assert EncodeRate.of(EncodeCosts(), FLOAT32, FLOPS, IMAGES) is None
