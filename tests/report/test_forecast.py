"""Verdicts on the costs of a cut."""

import dataclasses

import pytest

from pipeline.report.forecast import CutForecast, Forecast, break_even, verdict

HALF = CutForecast("0.5", 0.5, 100, 10**9, 10**6, encode_seconds=30.0, frozen_seconds=10.0, epoch_seconds=5.0)
FORECAST = Forecast("", 10, 40.0, total_bytes=1, full_epoch_seconds=40.0, epochs=3, cuts=[HALF])


@pytest.mark.parametrize(
    ("change", "runs", "free", "said"),
    [
        ({}, 2, None, "cache: 60.0 s for 6 epochs, against 90.0 s of running the frozen layers in every step"),
        ({}, 1, None, "do not cache: running the frozen layers in every step takes 45.0 s"),  # 30 + 15 is no less
        ({}, 2, 10**8, "do not cache: it takes 1.00 GB, and 0.10 GB of disk are free"),
        ({"frozen_seconds": 40.0, "encode_seconds": 120.0}, 1, None, "do not cache: full fine-tuning takes 120.0 s"),
        ({"epoch_seconds": None, "reason": "why"}, 1, None, "unknown: why"),
        ({"recycled": 0.0}, 1, None, "full fine-tuning"),
    ],
)
def test_verdicts(change: dict[str, float], runs: int, free: int | None, said: str) -> None:
    assert verdict(FORECAST, dataclasses.replace(HALF, **change), runs=runs, free=free).startswith(said)


def test_break_even_is_the_first_epoch_that_saved_more_than_the_encode_took() -> None:
    assert [break_even(30.0, saved) for saved in (10.0, 11.0, 31.0, 0.0, -1.0, None)] == [4, 3, 1, None, None, None]
