"""A dask scheduler with workers on loopback, each a process that the command line started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from services.loopback import end, free_port


@dataclass
class DaskCluster:
    address: str
    scheduler: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def dask_cluster() -> Iterator[DaskCluster]:
    """A scheduler with two workers that are started again when they die."""
    with ExitStack() as stack:
        yield start_dask(stack, workers=2)


def start_dask(stack: ExitStack, workers: int) -> DaskCluster:
    """Start a scheduler and workers, which end with `stack`."""
    folder = Path(tempfile.mkdtemp(prefix="dask-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    address = f"tcp://127.0.0.1:{free_port()}"
    scheduler = _start(stack, folder, "scheduler", "--host", address, "--no-dashboard")
    for number in range(workers):
        _start(stack, folder, *("worker", address, "--nthreads", "1", "--no-dashboard", "--name", str(number)))
    return DaskCluster(address, scheduler)


def _start(stack: ExitStack, folder: Path, *args: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": tiny.IMPORTS, "HF_HUB_OFFLINE": "1"}
    log = stack.enter_context((folder / f"{args[0]}.log").open("ab"))
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *args], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    stack.callback(end, process)
    return process
