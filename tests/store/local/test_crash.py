"""Whatever kills a writer, and however many write: whole segments or nothing, and the bytes of an undisturbed run."""

import multiprocessing
import os
import random
import shutil
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from pipeline.keys import Recipe
from pipeline.store import Store, sweep, temporary_folder, verify
from pipeline.store.local.temporary import FOREIGN_STALE_SECONDS, PREFIX

pytestmark = pytest.mark.slow

UNITS = 40
# A server that has imported everything forks each writer, so that a kill does not land in the imports.
WRITERS = multiprocessing.get_context("forkserver")
WRITERS.set_forkserver_preload(["pipeline.store"])


def write_all(path: Path, recipe: Recipe, shuffle: int | None = None, started: Event | None = None) -> None:
    if started is not None:
        started.set()
    store = Store.create(path, recipe)
    units = list(range(UNITS))
    if shuffle is not None:
        random.Random(shuffle).shuffle(units)
    for unit in units:
        rng = np.random.default_rng(unit)
        keys = rng.integers(0, 256, (6, 16), dtype=np.uint8)
        ragged = [rng.normal(size=(n, 3)) for n in rng.integers(0, 5, 6)]
        store.write_segment(keys, {"state.x": rng.normal(size=(6, 2000)), "state.r": ragged})


def start(*arguments) -> multiprocessing.process.BaseProcess:
    writer = WRITERS.Process(target=write_all, args=arguments)
    writer.start()
    return writer


@pytest.fixture
def undisturbed(tmp_path, recipe, fingerprint):
    write_all(tmp_path / "undisturbed", recipe)
    return fingerprint(tmp_path / "undisturbed")


def test_killed_at_any_moment_then_run_again_gives_the_same_bytes(tmp_path, recipe, fingerprint, undisturbed):
    path = tmp_path / "killed"
    rng = random.Random(0)
    begin = time.monotonic()
    write_all(tmp_path / "timed", recipe)
    whole_run = time.monotonic() - begin
    killed = interrupted = 0
    while killed < 10:
        started = WRITERS.Event()
        writer = start(path, recipe, None, started)
        assert started.wait(60)
        writer.join(rng.uniform(0, whole_run / 8))
        killed += writer.is_alive()
        writer.kill()
        writer.join()
        interrupted += any(path.glob(f"{PREFIX}*"))
        if (path / "recipe.json").exists():
            check_all_whole(path, undisturbed, fingerprint)
            if len(Store.open(path).segments()) == UNITS:
                shutil.rmtree(path)
    assert interrupted >= 3, "the kills hardly ever landed in a write"
    write_all(path, recipe)
    assert fingerprint(path) == undisturbed


def check_all_whole(path, undisturbed, fingerprint):
    """Every committed segment is that of the undisturbed run; everything else is a temporary folder."""
    store = Store.open(path)
    assert verify(store) == []
    kept = {name: value for name, value in fingerprint(path).items() if not name.startswith(PREFIX)}
    assert kept == {name: undisturbed[name] for name in kept}
    committed = {"recipe.json", *store.segments()}
    assert {name.split("/")[0] for name in kept} == committed
    assert len(kept) == len([name for name in undisturbed if name.split("/")[0] in committed])


def test_many_writers_of_the_same_units_agree(tmp_path, recipe, fingerprint, undisturbed):
    path = tmp_path / "shared"
    writers = [start(path, recipe, seed) for seed in range(4)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    assert fingerprint(path) == undisturbed


def test_broken_copies_are_replaced_by_many_writers_at_once(tmp_path, recipe, fingerprint, undisturbed):
    path = tmp_path / "copied"
    shutil.copytree(tmp_path / "undisturbed", path)
    for segment in Store.open(path).segments()[::2]:
        (path / segment / "zarr.json").unlink()
    writers = [start(path, recipe, seed) for seed in range(3)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert fingerprint(path) == undisturbed


def test_sweep_leaves_what_is_alive(tmp_path):
    with temporary_folder(tmp_path) as alive:
        sweep(tmp_path)
        assert alive.is_dir()
    assert not alive.exists()


def test_sweep_removes_what_a_dead_writer_left(tmp_path, recipe):
    writer = WRITERS.Process(target=hold_temporary_folder, args=(tmp_path,))
    writer.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*/ready")):
        assert time.monotonic() < deadline, "the writer never made its folder"
        time.sleep(0.005)
    sweep(tmp_path)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 1
    writer.kill()
    writer.join()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def hold_temporary_folder(root: Path) -> None:
    with temporary_folder(root) as path:
        (path / "ready").touch()
        time.sleep(60)


def test_sweep_leaves_other_machines_a_day(tmp_path):
    foreign = tmp_path / f"{PREFIX}elsewhere-0123456789abcdef"
    foreign.mkdir()
    sweep(tmp_path)
    assert foreign.is_dir()
    old = time.time() - FOREIGN_STALE_SECONDS - 60
    os.utime(foreign, (old, old))
    sweep(tmp_path)
    assert not foreign.exists()
