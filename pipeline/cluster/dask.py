"""Units on the workers of a dask scheduler: local processes, an existing scheduler, or batch jobs.

A task runs a few units, so that reading, computing and writing overlap; its worker keeps the encoder from task to task.
Where a worker is lost, dask gives its task to another one, which skips the committed units. The scheduler is an
existing one, or is started with its workers and ends with the run.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import chdir, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import dask
import distributed
import torch
from distributed import CancelledError, Client, LocalCluster, WorkerPlugin, get_worker
from distributed.scheduler import KilledWorker

from pipeline.cluster.job import Job
from pipeline.cluster.worker import REPORT, Rates, Worker, deaths
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.unit import Outcome, Unit
from pipeline.errors import ClusterError, ConfigError
from pipeline.keys import JSON

log = logging.getLogger("recycle")

UNITS_PER_TASK = 8
TASKS_PER_WORKER = 2
"""Tasks submitted per worker: enough that none is idle, few enough for the scheduler's memory."""
ONE_AT_A_TIME = threading.Lock()
"""Lock: a process has one working folder and one accelerator, so one run uses it at a time."""
CONNECT_SECONDS = 15
WAIT_SECONDS = 10
"""Time without any worker after which a warning is logged."""


class DaskWorkers:
    """Runs units on the workers of a scheduler."""

    workers = 0

    def __init__(self, job: Job, config: ExecutorConfig) -> None:
        """Prepare to run units of `job`; the scheduler is looked for, or started, when there are any."""
        self.job, self.config = job, config

    def run(self, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        """Run `units`; yield the outcome of each part once it is committed."""
        if not units:
            return
        for logger in ("distributed", "distributed.client"):
            logging.getLogger(logger).setLevel(logging.ERROR)  # lost workers are logged here
        with self.job.at_home(), _scheduler_of(self.config, self.job) as scheduler, _connect(scheduler) as client:
            name, address = f"recycle-{self.job.home.name}", client.scheduler.address
            try:
                client.register_plugin(EncoderPlugin(self.job, divides=self.config.kind == "local"), name)
            except Exception as error:
                raise ClusterError(
                    f"the workers of {address} cannot take units ({type(error).__name__}: {error}); install "
                    "layer-recycling there, in the same version"
                ) from error
            try:
                yield from self._run(client, units, name)
            except (OSError, CancelledError) as error:  # an error of a worker is neither
                raise ClusterError(
                    f"the scheduler at {address} is lost; what was committed stays: start it, and run again"
                ) from error
            finally:
                if client.status == "running":
                    client.unregister_worker_plugin(name)

    def _run(self, client: Client, units: Sequence[Unit], plugin: str) -> Iterator[Outcome]:
        workers, rates = _Workers(client), Rates(units)
        # Small enough tasks to keep all workers busy until the end.
        size = max(1, min(UNITS_PER_TASK, len(units) // (TASKS_PER_WORKER * 2 * max(1, workers.look()))))
        waiting = [UnitTask(range(len(units))[begin : begin + size]) for begin in range(0, len(units), size)]
        running, tasks = distributed.as_completed(loop=client.loop), dict[Any, UnitTask]()
        while waiting or tasks:
            while waiting and len(tasks) < TASKS_PER_WORKER * max(1, workers.look()):
                task = waiting.pop(0)
                own = {number: units[number] for number in task.numbers}
                future = client.submit(run_units, plugin, own, pure=False, resources=self.config.resources or None)
                tasks[future] = task
                running.add(future)
            future = next(running)
            task = tasks.pop(future)
            try:
                reports = future.result()  # held by a worker; if it dies first, the task runs again
            except KilledWorker:
                waiting.append(task.again(self.job))
                continue
            for report in map(REPORT.validate_json, reports):
                yield rates.outcome(report)
        rates.log_rates()


@dataclass(frozen=True)
class UnitTask:
    """Units that one worker runs in a row."""

    numbers: Sequence[int]
    deaths: int = 0
    """Number of processes that had died at these units when the task was submitted."""
    in_vain: int = 0
    """Number of retries since, without a process that died at them."""

    def again(self, job: Job) -> "UnitTask":
        """Return the task to submit again after its workers died; raises ClusterError if they start no unit."""
        died = deaths(job.home)
        now = sum(len(died[number]) for number in self.numbers)
        if now == self.deaths and self.in_vain >= job.retries:
            raise ClusterError(
                "the workers die before they begin a unit: out of memory as they build the model, or ended from "
                "outside; look into their logs, and give them more memory"
            )
        return UnitTask(self.numbers, now, self.in_vain + 1 if now == self.deaths else 0)


class EncoderPlugin(WorkerPlugin):  # type: ignore[misc]
    """Holds a worker's encoder from its first task until the run ends."""

    def __init__(self, job: Job, *, divides: bool) -> None:
        """Prepare for `job`; where one machine `divides` its accelerators, each worker gets one."""
        self.job, self.divides = job, divides

    def setup(self, worker: distributed.Worker) -> None:
        """Prepare; the encoder is built in the first task, because a worker that is busy here seems dead."""
        own: dict[str, JSON] = {}
        if self.divides:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C: the coordinator ends the workers
            logging.getLogger("pipeline").setLevel(logging.ERROR)  # it has warned of the model's settings, too
            if torch.accelerator.device_count() > 1 and self.job.sections["encode"].get("device", "auto") == "auto":
                kind = torch.accelerator.current_accelerator()
                own["device"] = f"{kind}:{worker.name % torch.accelerator.device_count()}"
        if multiprocessing.current_process().daemon:
            own["workers"] = 0  # may have no processes of its own
        self.worker, self.has_ended = Worker(self.job, str(worker.name), own), threading.Event()

    def teardown(self, worker: distributed.Worker) -> None:
        """Drop the encoder once the running task has ended."""
        self.has_ended.set()
        self.worker.leave()
        del self.worker


def run_units(plugin: str, units: Mapping[int, Unit]) -> list[str]:
    """Run units on the worker that this is called on, until they or the run end; return the reports as JSON."""
    own: EncoderPlugin = get_worker().plugins[plugin]
    lines: list[str] = []
    with ONE_AT_A_TIME, chdir("."), closing(own.worker.run(units)) as reports:  # back to this folder at the end
        for report in reports:
            lines.append(REPORT.dump_json(report).decode())
            if own.has_ended.is_set():
                break
    return lines


class _Workers:
    """The workers of a scheduler, watched as they come and go."""

    def __init__(self, client: Client) -> None:
        self.client, self.known = client, set[str]()
        try:
            client.wait_for_workers(1, timeout=WAIT_SECONDS)
        except TimeoutError:
            log.info("%s has no workers yet; waiting for them", client.scheduler.address)

    def look(self) -> int:
        """Return the number of workers; log those that left."""
        now = set(self.client.nthreads())
        for name in sorted(self.known - now):
            log.warning("worker %s left; what it had begun goes to another", name)
        self.known = now
        return len(now)


def _connect(scheduler: Any) -> Client:
    try:
        return Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {scheduler} ({' '.join(str(error).split())}); start one (dask scheduler), "
            "or set encode.executor.address or DASK_SCHEDULER_ADDRESS to one that runs"
        ) from error


@contextmanager
def _scheduler_of(config: ExecutorConfig, job: Job) -> Iterator[Any]:
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
