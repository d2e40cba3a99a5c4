"""SIGKILL at any moment: what was committed stays, and the rerun ends where an undisturbed run would have."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny

from pipeline.store import Store, verify

pytestmark = pytest.mark.slow

KILLS, MORE_KILLS = 4, 50
"""Kills in each of the four settings below, in `make test` and in `make faults`: there 200 in all."""

SETTINGS: dict[str, dict[str, Any]] = {
    "raw": {"codec": "raw"},
    "zstd": {"codec": "zstd"},
}


@dataclass(frozen=True)
class Finished:
    """A project that was encoded undisturbed, and the seconds it took."""

    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def server() -> Iterator[forks.Server]:
    with forks.serving(*forks.COMMANDS) as server:
        yield server


@pytest.fixture(scope="module", params=SETTINGS)
def finished(
    request: pytest.FixtureRequest, server: forks.Server, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp("undisturbed")
    make(folder, request.param)
    encode(server, folder, wait=True)
    shutil.rmtree(folder / "data")
    begin = time.monotonic()
    encode(server, folder, wait=True)
    return Finished(folder, time.monotonic() - begin)


def make(folder: Path, setting: str) -> None:
    """Every seventh image is cut short: its unit sets it aside, and later units must not move up for that."""
    tiny.write_images(folder / "photos", range(40))
    for image in sorted((folder / "photos").glob("*/*.png"))[3::7]:
        image.write_bytes(image.read_bytes()[:200])
    encode = {"cuts": [0, 0.5], "segment_samples": 7, "batch_size": 4, "max_bad": 1000} | SETTINGS[setting]
    tiny.write_params(folder, encode=encode)
    (folder / "setting").write_text(setting)


def encode(server: forks.Server, folder: Path, *, wait: bool = False) -> forks.Child:
    child = server.start(folder, "stages.cli:main", ["encode"])
    if wait:
        assert child.wait() == 0, child.said()
    return child


def committed(folder: Path) -> dict[str, bytes]:
    """Every file of the stores that is not in a temporary folder, once all is proved whole."""
    stores = folder / "data/activations"
    found = {}
    for path in sorted(stores.iterdir()) if stores.exists() else []:
        if (path / "recipe.json").exists():
            store = Store.open(path)
            segments = store.segments()
            assert verify(store) == []
            found[f"{path.name}/recipe.json"] = (path / "recipe.json").read_bytes()
            found |= {
                f"{path.name}/{one}/{name}": data for one in segments for name, data in tiny.files(path / one).items()
            }
    return found


@pytest.mark.parametrize("encoders", [1, 2])
def test_a_killed_encode_is_finished_by_the_next(
    server: forks.Server, finished: Finished, encoders: int, tmp_path: Path, long: bool
) -> None:
    make(tmp_path, (finished.folder / "setting").read_text())
    expected = tiny.files(finished.folder / "data/activations")
    draw = random.Random(encoders)
    kills = landed = 0
    kept: dict[str, bytes] = {}
    enough = MORE_KILLS if long else KILLS
    while kills < enough or (landed <= kills // 4 and kills < 3 * enough):  # a busy machine has them miss
        running = [encode(server, tmp_path) for _ in range(encoders)]
        draw.shuffle(running)
        for child in running:
            time.sleep(draw.uniform(0, 1.1 * encoders * finished.seconds) / len(running))
            kills += child.kill() == -signal.SIGKILL
            now = committed(tmp_path)
            assert now.items() >= kept.items(), "something committed is gone or has changed"
            assert now.items() <= expected.items(), "something was committed that an undisturbed run does not write"
            kept = now
            landed += bool(now) and now != expected
        if kept == expected:
            shutil.rmtree(tmp_path / "data")
            kept = {}
    assert landed > kills // 4, "the kills hardly ever landed in an encode"
    encode(server, tmp_path, wait=True)
    assert tiny.files(tmp_path / "data/activations") == expected
    samples = Path("data/samples.parquet")
    assert (tmp_path / samples).read_bytes() == (finished.folder / samples).read_bytes()


def test_a_killed_training_goes_on_to_the_same_weights(
    server: forks.Server, finished: Finished, tmp_path: Path
) -> None:
    setting = (finished.folder / "setting").read_text()
    run = Path("results/runs/0.5/model.safetensors")
    for folder in (finished.folder, tmp_path):
        make(folder, setting)
        encode(server, folder, wait=True)
    whole = server.start(finished.folder, "stages.cli:main", ["train", "--cut", "0.5"])
    assert whole.wait() == 0, whole.said()
    killed = server.start(tmp_path, "stages.cli:main", ["train", "--cut", "0.5"])
    checkpoints = tmp_path / ".recycle/checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("*/latest/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed; give it more epochs"
    assert list(checkpoints.glob("*/latest/progress.json"))
    again = server.start(tmp_path, "stages.cli:main", ["train", "--cut", "0.5"])
    assert again.wait() == 0, again.said()
    assert (tmp_path / run).read_bytes() == (finished.folder / run).read_bytes()
    assert not list(checkpoints.iterdir())
