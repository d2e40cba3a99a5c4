"""Settings of an executor that are wrong, and schedulers that are not there: one message that says what to set."""

import re
import sys
from pathlib import Path
from typing import Any

import perilous
import pytest
import tiny
from services.loopback import free_port

from pipeline.errors import ClusterError, ConfigError, RecyclingError
from pipeline.project import Project
from pipeline.workflows.encode import encode_project

pytestmark = pytest.mark.slow

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "ray"}, "encode.executor.kind: 'ray': Input should be 'local', 'dask' or 'slurm'"),
    ({"proceses": 2}, "encode.executor.proceses: unknown setting (did you mean processes?); encode.executor has kind"),
    ({"processes": 0}, "encode.executor.processes: 0: Input should be greater than or equal to 1"),
    ({"kind": "slurm", "processes": 2}, "processes is 2, which kind slurm does not use; remove it"),
    ({"jobs": 2}, "jobs is 2, which kind local does not use; remove it"),
    ({"kind": "dask", "jobs": 2}, "jobs is 2, which kind dask does not use without jobqueue; remove it"),
    ({"kind": "dask", "jobqueue": "cron"}, "encode.executor.jobqueue: 'cron': Input should be 'slurm', 'pbs'"),
    ({"kind": "dask", "jobqueue": "pbs", "address": "tcp://a:1"}, "address is 'tcp://a:1' and jobqueue is 'pbs'; keep"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    return tmp_path


def load(**executor: Any) -> Project:
    return Project.load(tiny.write_params(Path(), **perilous.settings(8, **executor)))


def refused(error: type[RecyclingError], said: str, **executor: Any) -> None:
    with pytest.raises(error, match=re.escape(said)) as raised:
        encode_project(load(**executor))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("executor", "said"), WRONG)
def test_wrong_settings(executor: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(**executor)


def test_no_scheduler_is_named() -> None:
    refused(
        ConfigError, "encode.executor.kind is dask, but there is no scheduler; set encode.executor.addr", kind="dask"
    )


@pytest.mark.parametrize("by_environment", [False, True])
def test_nobody_answers_at_the_address(monkeypatch: pytest.MonkeyPatch, by_environment: bool) -> None:
    monkeypatch.setattr("pipeline.cluster.dask.CONNECT_SECONDS", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address if by_environment else "tcp://not.used:1")
    settings = {"kind": "dask"} | ({} if by_environment else {"address": address})
    refused(ClusterError, f"no dask scheduler answers at {address} (", **settings)


def test_an_address_that_is_none() -> None:
    refused(ClusterError, "no dask scheduler answers at smoke://signals:1 (", kind="dask", address="smoke://signals:1")


@pytest.mark.parametrize(
    ("executor", "said"),
    [
        ({"kind": "slurm"}, "encode.executor.kind is slurm, but sbatch is not found; run on a machine that"),
        ({"kind": "dask", "jobqueue": "lsf"}, "encode.executor.jobqueue is 'lsf', but bsub is not found; run on a"),
    ],
)
def test_a_batch_system_that_is_not_there(monkeypatch: pytest.MonkeyPatch, executor: dict[str, Any], said: str) -> None:
    monkeypatch.setenv("PATH", str(Path.cwd()))
    refused(ClusterError, said, **executor)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    refused(ClusterError, "dask-jobqueue is not installed; pip install", kind="dask", jobqueue="slurm")
    monkeypatch.delitem(sys.modules, "pipeline.cluster.dask", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(ClusterError, "encode.executor needs a package that is not installed (", kind="local", processes=2)


def test_options_that_a_scheduler_does_not_take(slurm: None) -> None:
    refused(
        ConfigError, "encode.executor.options has array, which encode sets itself", kind="slurm", options={"array": 3}
    )
    refused(ClusterError, "sbatch refused the job (", kind="slurm", options={"partition": "nowhere"})
    refused(ConfigError, "encode.executor.options: You must specify how much cores", kind="dask", jobqueue="slurm")
    options = {"cores": 1, "memory": "1GB", "cherries": 2}
    refused(ConfigError, "encode.executor.options: ", kind="dask", jobqueue="slurm", options=options)
