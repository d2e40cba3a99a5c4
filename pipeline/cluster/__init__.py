"""Executors of encode beyond this process: the same units, run by workers that have an encoder each.

job.py         what a worker must know; it builds its encoder from that, and proves that it is the coordinator's
worker.py      runs units, skips those that are there, and sets aside one that keeps killing its process
dask.py        processes of this machine, a dask scheduler's workers, or those of a batch system
schedulers.py  the scheduler of these: found, or started with its workers
slurm.py       a job array
"""

from __future__ import annotations

from pipeline.cluster.job import Job
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.run import Executor
from pipeline.errors import ClusterError

__all__ = ["Job", "open_executor"]


def open_executor(job: Job, config: ExecutorConfig) -> Executor:
    """Return what runs units as `config` says; nothing is started before there are any.

    Raises:
        ClusterError: a package that it needs is not installed.
    """
    if config.kind == "slurm":
        from pipeline.cluster.slurm import SlurmArray  # noqa: PLC0415

        return SlurmArray(job, config)
    try:
        from pipeline.cluster.dask import DaskWorkers  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError as missing:
        raise ClusterError(
            f"encode.executor needs a package that is not installed ({missing}); pip install 'layer-recycling[cluster]'"
        ) from missing

    return DaskWorkers(job, config)
