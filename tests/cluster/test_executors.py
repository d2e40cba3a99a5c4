"""The same units by every executor on real schedulers: the same bytes, whatever dies meanwhile."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import perilous
import pytest
import tiny
from services.dask import DaskCluster, start_dask

from pipeline.flow import encode_project
from pipeline.project import Project

ROWS, UNITS = 26, 7
STORES = ("0.5", "1.0")
TIMEOUT = 600
JOBQUEUE = {"cores": 1, "memory": "1GB", "interface": "lo", "job_directives_skip": ["--mem"]}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process stores of the samples."""
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert encode_project(Project.load(tiny.write_params(folder, **perilous.settings(ROWS))))
    return stored(folder)


def stored(folder: Path) -> dict[str, bytes]:
    return tiny.files(folder / "data/activations")


def encode(folder: Path, **executor: Any) -> tuple[int, str]:
    """Run `recycle encode` in `folder`; return its exit code and what it said."""
    tiny.write_params(folder, **perilous.settings(ROWS, **executor))
    process = tiny.recycle(folder, "encode")
    said, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


def reasons(folder: Path) -> dict[str, str]:
    with (folder / "data/quarantine.csv").open(encoding="utf-8", newline="") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def wait_for(seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def segments(folder: Path) -> list[Path]:
    return list(folder.glob(f"data/activations/{STORES[0]}/*/zarr.json"))


def test_processes_of_this_machine(tmp_path: Path, expected: dict[str, bytes]) -> None:
    code, said = encode(tmp_path, kind="local", processes=2)
    assert code == 0, said
    assert stored(tmp_path) == expected
    assert f"cut 0.5: {ROWS} samples encoded, 0 were there" in said
    assert "samples/s" in said


def test_workers_of_a_scheduler_that_are_killed_and_a_unit_that_kills_them_all(
    tmp_path: Path, expected: dict[str, bytes], dask_cluster: DaskCluster
) -> None:
    """Row 5 kills whoever reads it first, rows 17 and 22 whoever reads them."""
    (tmp_path / f"{perilous.ONCE}-5").touch()
    for row in (17, 22):
        (tmp_path / f"{perilous.ALWAYS}-{row}").touch()
    code, said = encode(tmp_path, kind="dask", address=dask_cluster.address, retries=1)
    assert code == 3, said
    poisonous = {f"row {row}" for row in (16, 17, 18, 19, 20, 21, 22, 23)}
    assert reasons(tmp_path).keys() == poisonous
    assert all(
        reason.startswith("its unit killed the process that ran it: 2 times (") for reason in reasons(tmp_path).values()
    )
    there = stored(tmp_path)
    assert there.items() < expected.items()
    for row in (17, 22):
        (tmp_path / f"{perilous.ALWAYS}-{row}").unlink()
    code, said = encode(tmp_path, kind="dask", address=dask_cluster.address)
    assert code == 0, said
    assert "cut 1.0: 8 samples encoded, 18 were there" in said
    assert stored(tmp_path) == expected
    assert reasons(tmp_path) == {}


def test_a_scheduler_that_is_killed(tmp_path: Path, expected: dict[str, bytes]) -> None:
    with ExitStack() as stack:
        cluster = start_dask(stack, workers=1)
        (tmp_path / perilous.SLOW).touch()
        tiny.write_params(tmp_path, **perilous.settings(ROWS, kind="dask", address=cluster.address))
        process = tiny.recycle(tmp_path, "encode")
        wait_for(lambda: segments(tmp_path) or process.poll() is not None)
        cluster.scheduler.kill()
        said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1, said
    assert f"recycle: the scheduler at {cluster.address} is lost; what was committed stays" in said
    assert "Traceback" not in said
    there = stored(tmp_path)
    assert 0 < len(segments(tmp_path)) < UNITS
    code, said = encode(tmp_path, kind="local")
    assert code == 0, said
    assert there.items() < stored(tmp_path).items()
    assert stored(tmp_path) == expected


def test_a_job_array_of_which_a_task_is_killed(tmp_path: Path, expected: dict[str, bytes], slurm: None) -> None:
    (tmp_path / f"{perilous.ONCE}-5").touch()
    code, said = encode(tmp_path, kind="slurm", jobs=2, options={"comment": "a test", "exclusive": False})
    assert code == 0, said
    assert "7 units in 2 tasks" in said
    assert "ended with exit code" in said
    assert stored(tmp_path) == expected
    assert reasons(tmp_path) == {}
    assert not list((tmp_path / ".recycle/jobs").iterdir())


def test_ctrl_c_cancels_the_array(tmp_path: Path, slurm: None) -> None:
    (tmp_path / perilous.SLOW).touch()
    tiny.write_params(tmp_path, **perilous.settings(ROWS, kind="slurm", jobs=1))
    process = tiny.recycle(tmp_path, "encode")
    wait_for(lambda: segments(tmp_path) or process.poll() is not None)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1, said
    assert "Aborted" in said
    wait_for(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout)
    assert len(segments(tmp_path)) < UNITS


def test_batch_jobs_of_a_jobqueue(tmp_path: Path, expected: dict[str, bytes], slurm: None) -> None:
    code, said = encode(tmp_path, kind="dask", jobqueue="slurm", jobs=2, options=JOBQUEUE)
    assert code == 0, said
    assert stored(tmp_path) == expected
    assert not list(tmp_path.glob("*.out"))
