"""The dask scheduler of a run: an existing one, or one started with its workers and ended with the run."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster

from pipeline.cluster.job import Job
from pipeline.encode.config import ExecutorConfig
from pipeline.errors import ClusterError, ConfigError

CONNECT_SECONDS = 15


@contextmanager
def connected(scheduler: Any) -> Iterator[Client]:
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {scheduler} ({' '.join(str(error).split())}); start one (dask scheduler), "
            "or set encode.executor.address or DASK_SCHEDULER_ADDRESS to one that runs"
        ) from error
    with client:
        yield client


@contextmanager
def scheduler_of(config: ExecutorConfig, job: Job) -> Iterator[Any]:
    """Yield the address of a scheduler, or one that is started with its workers and ends with this context."""
    if config.kind == "dask" and not config.jobqueue:
        address = config.address or os.environ.get("DASK_SCHEDULER_ADDRESS")
        if not address:
            raise ConfigError(
                "encode.executor.kind is dask, but there is no scheduler; set encode.executor.address, or "
                "DASK_SCHEDULER_ADDRESS, or encode.executor.jobqueue to have one started"
            )
        yield address
        return
    settings = {"distributed.worker.daemon": False, "distributed.scheduler.worker-saturation": 1.0}
    own = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1, "memory_limit": 0}
    with (
        dask.config.set(settings),
        _jobqueue(config, job) if config.jobqueue else LocalCluster(n_workers=config.processes, **own) as cluster,
    ):
        yield cluster


def _jobqueue(config: ExecutorConfig, job: Job) -> Any:
    """Start a scheduler and submit jobs; arguments that the user did not set are those that encode needs."""
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        import dask_jobqueue  # noqa: PLC0415  (an extra that only this needs)
    except ImportError as error:
        raise ClusterError(
            f"encode.executor.jobqueue is {config.jobqueue!r}, but dask-jobqueue is not installed; "
            "pip install 'layer-recycling[cluster]'"
        ) from error
    signal.signal(signal.SIGINT, interrupted)  # its import takes Ctrl-C for itself
    kinds = {name.lower(): kind for name, kind in vars(dask_jobqueue).items()}
    kind: Any = kinds[f"{config.jobqueue}cluster"]
    command = kind.job_cls.submit_command.split()[0]
    if shutil.which(command) is None:
        raise ClusterError(
            f"encode.executor.jobqueue is {config.jobqueue!r}, but {command} is not found; run on a machine that "
            "submits jobs, or set PATH"
        )
    options: dict[str, Any] = {"processes": 1, "log_directory": str(job.home / "logs"), **config.options}
    options["scheduler_options"] = {"dashboard_address": ":0", **options.get("scheduler_options", {})}
    resources = " ".join(f"{name}={amount}" for name, amount in config.resources.items())
    options["worker_extra_args"] = [
        *(options.get("worker_extra_args", [])),
        *("--nthreads", "1", "--memory-limit", "0"),  # the batch system has one; dask would pause a worker below it
        *(["--resources", f"'{resources}'"] if resources else []),
    ]
    prologue = ["export DASK_DISTRIBUTED__WORKER__DAEMON=False"]
    options["job_script_prologue"] = [*prologue, *options.get("job_script_prologue", [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of a cluster that fails to start
        try:
            cluster, fault = kind(**options), ""
        except (TypeError, ValueError) as error:
            fault = " ".join(str(error).split())
    if fault:
        raise ConfigError(f"encode.executor.options: {fault}")
    cluster.scale(jobs=config.jobs or 1)
    return cluster
