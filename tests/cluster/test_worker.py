"""What a worker is told, builds from it, proves and tells; in this process, with everything said through JSON."""

import csv
import itertools
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import perilous
import pytest
import tiny
import yaml

from pipeline.cluster import Job
from pipeline.cluster.slurm import load_units, main, new_reports, save_units
from pipeline.cluster.worker import MARKS, REPORT, Rates, Worker
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.unit import Outcome, Unit
from pipeline.errors import ClusterError, StoreError
from pipeline.project import Project
from pipeline.store import Store
from pipeline.workflows.encode import encode_project

pytestmark = pytest.mark.slow

HERE: dict[str, Any] = {}
ELSEWHERE = {"kind": "local", "processes": 2}
Changes = dict[str, dict[str, Any]]


class ByWorker:
    """Runs units as a worker does that knows nothing but what it was told."""

    workers = 0
    jobs: list[Job]
    before: Callable[[Job], Any] = staticmethod(lambda job: None)

    def __init__(self, job: Job, config: ExecutorConfig) -> None:
        self.job = job
        self.jobs.append(job)

    def run(self, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        if not units:
            return
        with self.job.at_home():
            self.before(self.job)
            folder = self.job.home / "units"
            folder.mkdir()
            save_units(folder, 0, dict(enumerate(units)))
            worker = Worker(Job.model_validate_json(self.job.model_dump_json()), "0")
            for report in worker.run(load_units(folder, 0)):
                told = REPORT.validate_json(REPORT.dump_json(report))
                yield Rates(units).outcome(told)


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[ByWorker]:
    """Who runs units for `ELSEWHERE`, in a folder of the test."""
    monkeypatch.chdir(tmp_path)

    own = type("Own", (ByWorker,), {"jobs": []})
    monkeypatch.setattr("pipeline.cluster.open_executor", own)
    return own


def project(changes: Changes, executor: dict[str, Any], towers: dict[str, Any] | None = None) -> Project:
    path = tiny.write_params(Path(), **{**changes, "encode": changes.get("encode", {}) | {"executor": executor}})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | ({"towers": towers} if towers else {})))
    return Project.load(path)


def stored() -> dict[str, bytes]:
    return tiny.files(Path("data/activations")) | {"table": Path("data/samples.parquet").read_bytes()}


def quarantine() -> dict[str, str]:
    with Path("data/quarantine.csv").open(encoding="utf-8", newline="") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def images(_: Path) -> tuple[Changes, None]:
    tiny.write_images(Path("photos"), range(12))
    Path("photos/circle/bad.png").write_bytes(b"no image")
    augment = [{"RandomResizedCrop": {"size": 16, "scale": [0.5, 1.0]}}, "RandomHorizontalFlip"]
    encode = {"views": 2, "cuts": [0, 0.5], "max_bad": 1}
    return {"preprocess": {"augment": augment}, "encode": encode}, None


def pairs(bert: Path) -> tuple[Changes, dict[str, Any]]:
    words = ("one", "two", "three", "good", "bad")
    texts = [text for size in (1, 2, 3) for text in itertools.combinations_with_replacement(words, size)]
    lines = [{"q": " ".join(text), "a": " ".join([*text[::-1], "bad"])} for text in texts]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes: Changes = {
        "data": {"source": "pairs", "path": "pairs.jsonl", "anchor": "q", "positive": "a"},
        "model": {"backbone": f"hf:{bert}"},
        "preprocess": {"kind": "text", "image_size": None},
        "task": {"kind": "similarity", "layers": [4, {"activation": {"function": "relu"}}]},
        "encode": {"cuts": [0.5]},
    }
    return changes, {"positive": {"cut": 1.0}}


@pytest.mark.parametrize("make", [images, pairs])
def test_a_worker_gives_the_bytes_of_the_encoder_that_it_was_told_of(
    executor: type[ByWorker], text_folder: Path, make: Callable[[Path], tuple[Changes, Any]]
) -> None:
    changes, towers = make(text_folder)
    assert encode_project(project(changes, HERE, towers))
    here, costs = stored(), json.loads(Path("results/encode.json").read_text())["cuts"]
    shutil.rmtree("data")
    shutil.rmtree("results")
    shutil.rmtree(".recycle", ignore_errors=True)
    assert encode_project(project(changes, ELSEWHERE, towers))
    assert stored() == here
    assert [job.tower for job in executor.jobs] == (["anchor", "positive"] if towers else [None])
    for name, cost in json.loads(Path("results/encode.json").read_text())["cuts"].items():
        assert cost["measured"]["samples"] == costs[name]["measured"]["samples"]
        assert cost["measured"]["seconds_per_sample"].keys() == {"read", "forward", "write"}
    assert not list(Path(".recycle/jobs").iterdir())


def test_what_is_told_is_small_and_says_nothing_of_the_samples(executor: type[ByWorker]) -> None:
    changes, _ = images(Path())
    encode_project(project(changes, ELSEWHERE))
    (job,) = executor.jobs
    assert len(job.model_dump_json()) < 10_000
    assert job.folder == Path.cwd()
    assert "circle" not in job.model_dump_json()


def arrays(**executor: Any) -> Changes:
    return perilous.settings(20, **executor)


def test_a_committed_unit_asked_again_runs_nothing(executor: type[ByWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = tiny.count_forwards(monkeypatch)
    asked: dict[int, Unit] = {}

    def twice(self: ByWorker, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        asked.update(enumerate(units))
        with self.job.at_home():
            worker = Worker(self.job, "0")
            first = list(worker.run(asked))
            forwards.clear()
            again = list(worker.run(asked))
            assert forwards == []
            assert [(one.unit, one.part) for one in again] == [(one.unit, one.part) for one in first]
            assert not list((self.job.home / MARKS).iterdir())
            yield from map(Rates(units).outcome, again)

    monkeypatch.setattr(executor, "run", twice)
    assert encode_project(project(arrays(), ELSEWHERE))
    assert len(asked) == 5
    assert len(Store.open(Path("data/activations/0.5")).keys()) == 20


@pytest.mark.parametrize(("deaths", "bad"), [(2, 0), (3, 4)])
def test_a_unit_that_killed_more_processes_than_retries_allow_is_set_aside(
    executor: type[ByWorker], deaths: int, bad: int
) -> None:
    def mark(job: Job) -> None:
        (job.home / MARKS).mkdir()
        for number in range(deaths):
            (job.home / MARKS / f"1.{number}.node{number}:7").touch()

    executor.before = staticmethod(mark)
    assert encode_project(project(arrays(), ELSEWHERE)) is (bad == 0)
    said = quarantine()
    assert len(said) == bad
    assert len(Store.open(Path("data/activations/1.0")).keys()) == 20 - bad
    if bad:
        assert said.keys() == {f"row {row}" for row in range(4, 8)}
        assert set(said.values()) == {
            "its unit killed the process that ran it: 3 times (node0:7, node1:7, node2:7); mend the sample, or give "
            "more memory"
        }
        executor.before = staticmethod(lambda job: None)
        assert encode_project(project(arrays(), ELSEWHERE))
        assert quarantine() == {}
        assert len(Store.open(Path("data/activations/1.0")).keys()) == 20


def another_network(job: Job) -> None:
    job.sections["model"]["seed"] = 1


def another_data_set(job: Job) -> None:
    job.sections["data"]["options"]["rows"] = 19


def another_place(job: Job) -> None:
    os.rename(job.home / "job.json", job.home / "gone")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_network, "its encoder has weights = '[0-9a-f]{32}', the coordinator's '[0-9a-f]{32}'; give all"),
        (another_data_set, "the data set has 19 samples there, 20 here; let data.path name"),
        (another_place, r"the project's folder /\S+ cannot be seen there; put the project on a file system that"),
    ],
)
def test_a_worker_that_would_make_something_else_says_so(
    executor: type[ByWorker], change: Callable[[Job], None], said: str
) -> None:
    executor.before = staticmethod(change)
    with pytest.raises(ClusterError, match=rf"^worker \S+:0: {said}"):
        encode_project(project(arrays(), ELSEWHERE))
    assert not Store.open(Path("data/activations/0.5")).segments()
    executor.before = staticmethod(lambda job: None)
    assert encode_project(project(arrays(), ELSEWHERE))


def test_an_error_that_ends_the_run_is_told_once_as_it_is(
    executor: type[ByWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("data/activations/0.5: cannot be written (No space left on device)")

    monkeypatch.setattr(Store, "write_segment", full)
    with pytest.raises(StoreError, match=r"^worker \S+:0: data/activations/0.5: cannot be written \(No space"):
        encode_project(project(arrays(), ELSEWHERE))


def test_an_error_that_nobody_expected_names_worker_and_kind(
    executor: type[ByWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("pipeline.encode.encoder.Encoder._forward", out_of_memory)
    with pytest.raises(ClusterError, match=r"^worker \S+:0: RuntimeError: CUDA out of memory. Tried to allocate; its"):
        encode_project(project(arrays(), ELSEWHERE))


def test_a_task_tells_line_by_line_and_a_half_line_is_not_read(
    executor: type[ByWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_task(self: ByWorker, units: Sequence[Unit]) -> Generator[Outcome, None, None]:
        with self.job.at_home():
            folder = self.job.home / "round-0"
            folder.mkdir()
            for task in (0, 1):
                save_units(folder, task, dict(list(enumerate(units))[task::2]))
            read = defaultdict[Path, int](int)
            assert main(folder, 0) == 0
            (folder / "1.jsonl").write_text('{"worker": "b:1", "un')
            told = list(new_reports(folder, read))
            assert list(new_reports(folder, read)) == []
            assert sorted(report.unit for report in told) == [0, 2, 4]
            (folder / "1.jsonl").unlink()
            shutil.move(self.job.home / "job.json", self.job.home / "moved")
            with pytest.raises(OSError, match=r"job\.json"):
                main(folder, 1)
            os.rename(self.job.home / "moved", self.job.home / "job.json")
            assert main(folder, 1) == 0
            yield from map(Rates(units).outcome, [*told, *new_reports(folder, read)])

    monkeypatch.setattr(executor, "run", by_task)
    assert encode_project(project(arrays(), ELSEWHERE))


def test_units_survive_the_way_to_a_task(tmp_path: Path) -> None:
    keys = np.arange(80, dtype=np.uint8).reshape(5, 16)
    units = {3: Unit(np.arange(3), keys[:3], ((0, 0), (1, 1))), 12: Unit(np.asarray([7, 9]), keys[3:], ((2, 0),))}
    save_units(tmp_path, 5, units)
    read = load_units(tmp_path, 5)
    assert list(read) == [3, 12]
    for number, unit in units.items():
        assert read[number].rows.tolist() == unit.rows.tolist()
        assert read[number].keys.tolist() == unit.keys.tolist()
        assert read[number].stores == unit.stores
    assert re.fullmatch(r"5\.npz", next(tmp_path.iterdir()).name)
