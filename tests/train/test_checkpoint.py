"""Which epoch of a run is its best."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pipeline.train.checkpoint import Progress, resume, save

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "higher", "best"),
    [
        ([0.1, 0.3, 0.3, 0.2], True, 2),
        ([3.0, 1.0, 1.0, 2.0], False, 2),
        ([NAN, 0.2, NAN, 0.1], True, 2),
        ([NAN, NAN, NAN], True, 3),
        ([NAN, NAN, NAN], False, 3),
        ([-math.inf, -5.0], True, 2),
    ],
)
def test_the_best_round(values: list[float], higher: bool, best: int) -> None:
    progress = Progress()
    for value in values:
        progress.take({}, value, higher=higher)
    assert progress.best_round == best


def test_patience_counts_from_the_best_round() -> None:
    progress = Progress()
    for value in (2.0, 1.0, 1.5):
        progress.take({}, value, higher=False)
    assert not progress.exhausted(10, 2)
    progress.take({}, 1.2, higher=False)
    assert progress.exhausted(10, 2)
    unscored = Progress()
    for _ in range(5):
        unscored.take({}, NAN)
    assert not unscored.exhausted(10, 1)
    assert unscored.exhausted(5, 1)


def test_weights_that_lie_channels_last_are_saved_and_read_back(tmp_path: Path) -> None:
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    expected = {name: tensor.clone() for name, tensor in convolution.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(convolution)
    save(accelerator, prepared.state_dict(), tmp_path, Progress(rounds=1), better=True)
    torch.nn.init.zeros_(convolution.weight)
    assert resume(accelerator, tmp_path).rounds == 1
    for found in (load_file(tmp_path / "best.safetensors"), convolution.state_dict()):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
