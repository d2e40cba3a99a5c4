"""Executors of encode units in other processes: local ones, dask workers, Slurm tasks.

job.py         what a worker needs to build the same encoder as the coordinator, and to check that it is the same
worker.py      runs units, skips committed ones, sets aside a unit that keeps killing its process
dask.py        units on dask workers: local processes, an existing scheduler, or batch jobs
slurm.py       units as the tasks of a Slurm job array
"""

from pipeline.cluster.job import Job
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.run import Executor
from pipeline.errors import ClusterError

__all__ = ["Job", "open_executor"]


def open_executor(job: Job, config: ExecutorConfig) -> Executor:
    """Return the executor for `config`, started when there are units; raises ClusterError if a package is missing."""
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
