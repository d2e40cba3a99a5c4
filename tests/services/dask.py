"""A dask scheduler with workers on loopback, each a process that the command line started."""

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

from services.loopback import free_port, start


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
    dask, environment = [sys.executable, "-m", "dask"], {"PYTHONPATH": tiny.IMPORTS, "HF_HUB_OFFLINE": "1"}
    scheduler = start(stack, folder, [*dask, "scheduler", "--host", address, "--no-dashboard"], environment)
    for number in range(workers):
        options = ["--nthreads", "1", "--no-dashboard", "--name", str(number)]
        start(stack, folder, [*dask, "worker", address, *options], environment)
    return DaskCluster(address, scheduler)
