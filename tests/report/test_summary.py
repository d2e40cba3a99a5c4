"""The arithmetic of the result table."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from pipeline.report.summary import CutCost, curves, plot, summarise, table
from pipeline.runs.record import Run

FULL = Run(
    name="0",
    cut=0,
    overrides={},
    identity="",
    settings={},
    recycled=0.0,
    metric="accuracy",
    value=0.9,
    initial=0.1,
    best_epoch=2,
    train_samples=1000,
    train_seconds_per_epoch=40.0,
    history=[{"train/loss": 1.0, "train/seconds": 40.0, "validation/accuracy": value} for value in (0.8, 0.9)],
)
HALF = dataclasses.replace(FULL, name="0.5", cut=0.5, recycled=0.5, train_seconds_per_epoch=10.0)
COSTS = {"0": CutCost(100.0, 3.0, 0.0), "0.5": CutCost(2048.4, 12.0, 0.005)}


def test_speedups_and_break_even() -> None:
    full, half = summarise([HALF, FULL], COSTS)
    assert (full.cut, full.speedup_over_full, full.speedup_over_frozen, full.break_even_epoch) == (0, 1.0, 1.0, None)
    # The frozen prefix takes 0.005 s x 1000 samples = 5 s an epoch: 15 s against 10 s.
    assert (half.speedup_over_full, half.speedup_over_frozen) == (4.0, 1.5)
    # Encoding costs 12 s and saves 5 s an epoch: 2 epochs save 10 s, 3 save 15 s.
    assert half.break_even_epoch == 3
    assert half.state_bytes_per_sample == 2048
    assert half.epochs == 2


def test_test_scores_have_a_column_where_runs_have_them() -> None:
    tested = [
        dataclasses.replace(HALF, overrides={"train.seed": seed}, test={"accuracy": 0.7 + seed / 10}) for seed in (0, 1)
    ]
    full, half = summarise([FULL, *tested], COSTS)
    assert (full.test, full.test_spread) == (None, None)
    assert (half.test, half.test_spread) == (pytest.approx(0.75), pytest.approx(0.0707, abs=1e-4))
    assert "test accuracy" in table([full, half])
    assert "0.750 ± 0.071 (2)" in table([full, half])
    assert "test accuracy" not in table([full])
    (mixed,) = summarise([HALF, *tested], COSTS)
    assert (mixed.runs, mixed.test) == (3, None)


def test_without_full_fine_tuning_there_is_nothing_to_compare_with() -> None:
    (half,) = summarise([HALF], COSTS)
    assert half.speedup_over_full is None
    assert " - " in table([half])


def test_an_encode_that_was_never_timed_says_nothing_of_break_even() -> None:
    (half,) = summarise([HALF], {"0.5": CutCost(2048.0)})
    assert half.encode_seconds is None
    assert (half.speedup_over_frozen, half.break_even_epoch) == (None, None)


def test_a_store_that_was_encoded_elsewhere_has_its_row() -> None:
    (half,) = summarise([HALF], {})
    assert (half.state_bytes_per_sample, half.encode_seconds, half.speedup_over_frozen) == (None, None, None)
    assert table([half]).splitlines()[1].split()[-3:] == ["-", "-", "-"]
    assert curves([HALF], {})["seconds"].tolist() == [40.0, 80.0]


@pytest.mark.parametrize(
    ("before", "after", "full", "frozen", "bounded"),
    [
        # Half of the operations before the cut: at most (1 + 1) / 1 over full, and (1 + 3) / 3 over frozen layers.
        (1e9, 1e9, 2.0, 4 / 3, ["speedup_over_full"]),  # 1.5 is within 20 % of 1.33
        (1e9, 3e9, 4 / 3, 10 / 9, ["speedup_over_full", "speedup_over_frozen"]),
        (3e9, 1e9, 4.0, 1.5, []),
        (1e9, 1.0, 4.0, 1.5, []),  # the head alone: computation bounds nothing
        (1e9, 0.0, 4.0, 1.5, []),
    ],
)
def test_a_speed_up_is_bounded_by_the_operations(
    before: float, after: float, full: float, frozen: float, bounded: list[str]
) -> None:
    costs = COSTS | {"0.5": dataclasses.replace(COSTS["0.5"], flops_before=before, flops_after=after)}
    _, half = summarise([FULL, HALF], costs)
    assert half.bounded == bounded
    assert half.speedup_over_full == pytest.approx(full)
    assert half.speedup_over_frozen == pytest.approx(frozen if "speedup_over_frozen" in bounded else 1.5)
    text = table([half])
    assert text.count("<=") == len(bounded) + bool(bounded)
    # What is saved per epoch is bounded with it: 10 s x (10/9 - 1), of 12 s to be saved.
    assert half.break_even_epoch == (11 if "speedup_over_frozen" in bounded else 3)


def test_adapters_have_a_cheaper_backward_pass_and_a_higher_bound() -> None:
    costs = COSTS | {"0.5": dataclasses.replace(COSTS["0.5"], flops_before=1e9, flops_after=3e9)}
    (adapted,) = summarise([dataclasses.replace(HALF, made_of={"train": {"adapter": {"kind": "lora"}}})], costs)
    assert adapted.speedup_over_frozen == pytest.approx((1 + 2 * 3) / (2 * 3))


def test_what_is_kept_of_full_fine_tuning() -> None:
    runs = [FULL, dataclasses.replace(FULL, name="1", value=0.7), dataclasses.replace(HALF, value=0.6)]
    assert [row.kept for row in summarise(runs, COSTS)] == [1.0, pytest.approx(0.75)]
    errors = [dataclasses.replace(run, metric="rmse") for run in runs]
    assert [row.kept for row in summarise(errors, COSTS)] == [1.0, pytest.approx(0.8 / 0.6)]


def test_the_table_has_a_line_per_run() -> None:
    lines = table(summarise([FULL, HALF], COSTS)).splitlines()
    assert len(lines) == 3
    assert "accuracy" in lines[0]
    assert "2,048" in lines[2]


def test_curves_start_after_the_encode(tmp_path: Path) -> None:
    frame = curves([HALF], COSTS)
    assert frame["seconds"].tolist() == [52.0, 92.0]
    assert frame["value"].tolist() == [0.8, 0.9]
    plot([FULL, HALF], COSTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_a_row_for_each_group_of_settings(tmp_path: Path) -> None:
    seed, share = (dataclasses.replace(HALF, overrides={name: 1}) for name in ("train.seed", "data.fraction"))
    heights = []
    for runs in ([HALF], [FULL, HALF, seed], [FULL, HALF, share]):
        plot(runs, COSTS, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            heights.append(image.height)
    assert heights[0] == heights[1]
    assert heights[2] > 1.5 * heights[0]
