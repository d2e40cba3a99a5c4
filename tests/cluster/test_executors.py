"""The same units by every executor on real schedulers: the same bytes, whatever dies meanwhile."""

import csv
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import perilous
import pytest
import tiny
from services.dask import DaskCluster, start_dask

from pipeline.errors import ClusterError
from pipeline.project import Project
from pipeline.workflows.encode import encode_project

pytestmark = pytest.mark.slow

ROWS, UNITS = 26, 7
STORES = ("0.5", "1.0")
TEN = (1, 2, 5, 6, 9, 10, 13, 14, 17, 18)
"""Rows of the first five units, none of them on its unit's edge."""
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """An empty project, in the current directory; workers that start here import what is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", tiny.IMPORTS)
    caplog.set_level("INFO", logger="recycle")
    return tmp_path


def encode(folder: Path, **executor: Any) -> bool:
    return encode_project(Project.load(tiny.write_params(folder, **perilous.settings(ROWS, **executor))))


def once_begun(folder: Path, act: Callable[[], object]) -> threading.Thread:
    """Act as soon as the first segment is there."""

    def wait() -> None:
        wait_for(lambda: segments(folder))
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


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


class ExecutorContract:
    """What every executor promises; a subclass is one executor, with its settings."""

    @pytest.fixture
    def executor(self) -> dict[str, Any]:
        """The section `encode.executor`."""
        raise NotImplementedError

    def test_the_bytes_are_those_of_one_process(
        self, folder: Path, expected: dict[str, bytes], executor: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert encode(folder, **executor)
        assert stored(folder) == expected
        assert f"cut 0.5: {ROWS} samples encoded, 0 were there" in caplog.text


class MortalExecutorContract(ExecutorContract):
    """Of an executor whose processes may die."""

    told = ""
    """What is said of the death."""

    def test_the_units_of_a_process_that_dies_are_run_by_another(
        self, folder: Path, expected: dict[str, bytes], executor: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        (folder / f"{perilous.ONCE}-5").touch()
        assert encode(folder, **executor)
        assert stored(folder) == expected
        assert reasons(folder) == {}
        assert not (folder / f"{perilous.ONCE}-5").exists()
        assert re.search(self.told, caplog.text)


class TestLocalProcesses(MortalExecutorContract):
    @pytest.fixture
    def executor(self) -> dict[str, Any]:
        return {"kind": "local", "processes": 2}


class TestDaskScheduler(MortalExecutorContract):
    @pytest.fixture
    def executor(self, dask_cluster: DaskCluster) -> dict[str, Any]:
        return {"kind": "dask", "address": dask_cluster.address}


class TestSlurmArray(MortalExecutorContract):
    told = (
        r"7 units in 2 tasks(?s:.)*job \d+ ended with exit code \d+; \d units are left and go again; the end of a log"
    )

    @pytest.fixture
    def executor(self, slurm: None) -> dict[str, Any]:
        return {"kind": "slurm", "jobs": 2, "options": {"comment": "a test", "exclusive": False}}


class TestJobqueue(ExecutorContract):
    @pytest.fixture
    def executor(self, slurm: None) -> dict[str, Any]:
        return {"kind": "dask", "jobqueue": "slurm", "jobs": 2, "options": JOBQUEUE}


def test_workers_that_are_killed_and_a_unit_that_kills_all_of_them(
    folder: Path,
    expected: dict[str, bytes],
    dask_cluster: DaskCluster,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Some rows kill whoever reads them first, in the midst of a unit; row 22 whoever reads it."""
    retries, killing = (2, TEN) if request.config.getoption("--faults") else (1, TEN[:1])
    for row in killing:
        (folder / f"{perilous.ONCE}-{row}").touch()
    always = folder / f"{perilous.ALWAYS}-22"
    always.touch()
    assert not encode(folder, kind="dask", address=dask_cluster.address, retries=retries)
    assert not list(folder.glob(f"{perilous.ONCE}-*"))
    assert reasons(folder).keys() == {f"row {row}" for row in range(20, 24)}
    begin = f"its unit killed the process that ran it: {retries + 1} times ("
    assert all(reason.startswith(begin) for reason in reasons(folder).values())
    assert stored(folder).items() < expected.items()
    always.unlink()
    caplog.clear()
    assert encode(folder, kind="dask", address=dask_cluster.address)
    assert "cut 1.0: 4 samples encoded, 22 were there" in caplog.text
    assert stored(folder) == expected
    assert reasons(folder) == {}


def test_a_scheduler_that_is_killed(folder: Path, expected: dict[str, bytes]) -> None:
    (folder / perilous.SLOW).touch()
    with ExitStack() as stack:
        cluster = start_dask(stack, workers=1)
        killing = once_begun(folder, cluster.scheduler.kill)
        lost = f"the scheduler at {cluster.address} is lost; what was committed stays"
        with pytest.raises(ClusterError, match=re.escape(lost)):
            encode(folder, kind="dask", address=cluster.address)
        killing.join()
    there = stored(folder)
    assert 0 < len(segments(folder)) < UNITS
    assert encode(folder)
    assert there.items() < stored(folder).items()
    assert stored(folder) == expected


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_cancels_the_array(folder: Path, slurm: None, interruptible: None) -> None:
    (folder / perilous.SLOW).touch()
    interrupting = once_begun(folder, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        encode(folder, kind="slurm")
    interrupting.join()
    wait_for(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout)
    assert 0 < len(segments(folder)) < UNITS
