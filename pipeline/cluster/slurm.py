"""Units as the tasks of a Slurm job array.

The coordinator and the tasks exchange files in the job's folder: the units of a round, and the reports of each task in
JSON lines, of which the coordinator reads complete ones only. A round ends when all its tasks have ended; units that
were not finished form the next round. `python -m pipeline.cluster.slurm FOLDER TASK` runs one task.
"""

import itertools
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline import errors
from pipeline.cluster.job import FILE, Job
from pipeline.cluster.worker import Rates, Worker, WorkerReport, deaths
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.unit import Outcome, Unit
from pipeline.errors import ClusterError, ConfigError, RecyclingError
from pipeline.files import whole

log = logging.getLogger("recycle")

POLL_SECONDS, POLL_SECONDS_PER_TASK = 0.5, 0.005
LATE_SECONDS, LATE_SECONDS_OF_KILLED = 30.0, 2.0
"""Time for a network file system to show the last lines of an ended task; those of a killed task may be lost."""
LOG_LINES = 10
OURS = frozenset({"array", "chdir", "error", "job-name", "output", "parsable", "wait", "wrap"})
"""Options of sbatch that are set here."""
UNITS = ".npz"
ARRAYS = ("rows", "keys", "stores")
REPORTS = ".jsonl"


@dataclass(frozen=True)
class Failure:
    """Why a task gave up."""

    error: str
    """Name of its class in `pipeline.errors`."""
    message: str


LINE: TypeAdapter[WorkerReport | Failure] = TypeAdapter(WorkerReport | Failure)


class SlurmArray:
    """Runs units on a cluster by sbatch."""

    workers = 0

    def __init__(self, job: Job, config: ExecutorConfig) -> None:
        """Prepare to run units of `job`; nothing is submitted before there are any.

        Raises:
            ConfigError: `config.options` has one that is set here.
            ClusterError: sbatch is not found.
        """
        if taken := sorted(config.options.keys() & OURS):
            raise ConfigError(f"encode.executor.options has {taken[0]}, which encode sets itself; remove it")
        if shutil.which("sbatch") is None:
            remedy = "run on a machine that submits jobs, or set PATH"
            raise ClusterError(f"encode.executor.kind is slurm, but sbatch is not found; {remedy}")
        self.job, self.config = job, config

    def run(self, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        """Run `units`; yield the outcome of each part once it is committed."""
        if not units:
            return
        waiting, rates, seen = dict(enumerate(units)), Rates(units), set[tuple[int, int]]()
        with self.job.at_home():
            for number in itertools.count():
                for report in self._round(self.job.home / f"round-{number}", waiting):
                    if (report.unit, report.part) not in seen:  # of a unit that was started again
                        seen.add((report.unit, report.part))
                        yield rates.outcome(report)
                if not waiting:
                    break
        rates.log_rates()

    def _round(self, folder: Path, waiting: dict[int, Unit]) -> Iterator[WorkerReport]:
        """Submit an array for the units `waiting`; yield their reports, and remove the finished units.

        Raises:
            RecyclingError: a task gave up; it is the task's own error.
            ClusterError: the array ended before a unit did.
        """
        folder.mkdir()
        tasks, died, at_start = min(self.config.jobs or 1, len(waiting)), deaths(self.job.home), len(waiting)
        for task in range(tasks):
            save_units(folder, task, {number: waiting[number] for number in list(waiting)[task::tasks]})
        left = Counter({number: len(unit.parts) for number, unit in waiting.items()})
        with _submitted(self._command(folder, tasks)) as (array, process):
            log.info("job %s: %d units in %d tasks, logs in %s", array, at_start, tasks, folder)
            for line in _reports(folder, process, tasks):
                if isinstance(line, Failure):
                    raise getattr(errors, line.error)(line.message)
                left[line.unit] -= 1
                if not left[line.unit]:
                    del waiting[line.unit]
                yield line
                if not waiting:
                    return
        message = f"job {array} ended with exit code {process.returncode}"
        if len(waiting) == at_start and deaths(self.job.home) == died:
            raise ClusterError(f"{message} before it had run a unit; the end of its log {_last_log(folder)}")
        log.warning("%s; %d units are left and go again; the end of a log %s", message, len(waiting), _last_log(folder))

    def _command(self, folder: Path, tasks: int) -> list[str]:
        run = [sys.executable, "-m", "pipeline.cluster.slurm", str(folder)]
        given = {name: value for name, value in self.config.options.items() if value is not False}
        options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        return [
            *("sbatch", "--wait", "--parsable", f"--array=0-{tasks - 1}", "--job-name=recycle"),
            *(f"--chdir={self.job.folder}", f"--output={folder}/%a.log", *options),
            *("--wrap", f"exec {shlex.join(run)} $SLURM_ARRAY_TASK_ID"),
        ]


@contextmanager
def _submitted(command: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Submit a job array, and yield its id and the process that waits for its end; ClusterError if it is refused.

    Tasks that still run at the end of the context are cancelled.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:  # noqa: S603
        job = process.stdout.readline().strip().partition(";")[0] if process.stdout else ""
        if not job:
            message = " ".join(process.stderr.read().split()) if process.stderr else ""
            raise ClusterError(f"sbatch refused the job ({message}); see encode.executor.options, and sinfo")
        try:
            yield job, process
        finally:
            if process.poll() is None:
                subprocess.run(["scancel", job], check=False)  # noqa: S603, S607
                process.terminate()


def _reports(folder: Path, process: subprocess.Popen[str], tasks: int) -> Iterator[WorkerReport | Failure]:
    """Yield the reports of the tasks until the array has ended and no more can come."""
    read, last = defaultdict[Path, int](int), float("inf")
    while time.monotonic() < last:
        code = process.poll()
        if code is not None and last == float("inf"):
            last = time.monotonic() + (LATE_SECONDS_OF_KILLED if code else LATE_SECONDS)
        yield from new_reports(folder, read)
        time.sleep(max(POLL_SECONDS, tasks * POLL_SECONDS_PER_TASK))


def new_reports(folder: Path, read: defaultdict[Path, int]) -> Iterator[WorkerReport | Failure]:
    """Yield the new complete lines of the tasks of a round; `read` counts the bytes of each file that were read."""
    for file in sorted(folder.glob(f"*{REPORTS}")):
        with file.open("rb") as stream:
            stream.seek(read[file])
            text = stream.read()
        text = text[: text.rfind(b"\n") + 1]
        read[file] += len(text)
        yield from map(LINE.validate_json, text.splitlines())


def _last_log(folder: Path) -> str:
    """Return the last lines of the log that was written to last."""
    logs = sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime)
    if not logs:
        return f"is not in {folder}"
    text = logs[-1].read_text(encoding="utf-8", errors="backslashreplace")
    return "\n".join([f"{logs[-1]}:", *text.splitlines()[-LOG_LINES:]])


def save_units(folder: Path, task: int, units: Mapping[int, Unit]) -> None:
    """Write the units of a task, by their numbers in the run."""
    arrays = {f"{name}.{number}": getattr(unit, name) for number, unit in units.items() for name in ARRAYS}
    with whole(folder / f"{task}{UNITS}") as file, file.open("wb") as stream:
        np.savez(stream, **arrays)


def load_units(folder: Path, task: int) -> dict[int, Unit]:
    """Return the units that `save_units` wrote."""
    with np.load(folder / f"{task}{UNITS}", allow_pickle=False) as saved:
        arrays: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        for own, array in saved.items():
            name, _, number = own.partition(".")
            arrays[int(number)][name] = array
    return {
        number: Unit(of["rows"], of["keys"], tuple((view, cut) for view, cut in of["stores"].tolist()))
        for number, of in arrays.items()
    }


def main(folder: Path, task: int) -> int:
    """Run the units of `task`; return the exit code: 1 where it gave up."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # taken back, or out of time: no crash
    job = Job.model_validate_json((folder.parent / FILE).read_text(encoding="utf-8"))
    with (folder / f"{task}{REPORTS}").open("a", encoding="utf-8") as reports:
        try:
            for report in Worker(job, str(task)).run(load_units(folder, task)):
                reports.write(LINE.dump_json(report).decode() + "\n")
                reports.flush()
        except RecyclingError as error:
            log.error("%s", error)
            reports.write(LINE.dump_json(Failure(type(error).__name__, str(error))).decode() + "\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
