"""One task of a job array: `python -m pipeline.cluster.task FOLDER TASK` runs its share of the units of a round.

FOLDER has the units of each task and receives their reports: a file of JSON lines per task, of which the coordinator
reads complete lines only.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from pipeline.cluster.job import FILE, Job
from pipeline.cluster.worker import Worker, WorkerReport
from pipeline.encode.unit import Unit
from pipeline.errors import RecyclingError
from pipeline.files import whole

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


class Lines:
    """The reports of the tasks of a round, read as they are written."""

    def __init__(self, folder: Path) -> None:
        """Begin at the first line of each file in `folder`."""
        self.folder, self.read = folder, defaultdict[Path, int](int)

    def new(self) -> Iterator[WorkerReport | Failure]:
        """Yield the new complete lines."""
        for file in sorted(self.folder.glob(f"*{REPORTS}")):
            with file.open("rb") as stream:
                stream.seek(self.read[file])
                text = stream.read()
            text = text[: text.rfind(b"\n") + 1]
            self.read[file] += len(text)
            yield from map(LINE.validate_json, text.splitlines())


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
            logging.getLogger("recycle").error("%s", error)
            reports.write(LINE.dump_json(Failure(type(error).__name__, str(error))).decode() + "\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
