"""A project whose stores lie in a bucket: encoded, continued, trained from and looked after as on a disk."""

import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from services.s3 import SECRET_KEY, Bucket

from pipeline.errors import ConfigError, StaleStoreError, StoreError
from pipeline.project import Project
from pipeline.runs.finished import open_run
from pipeline.store import Bucket as Objects
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.train import train_project
from stages.cli import recycle

pytestmark = pytest.mark.slow

ENCODE = {"cuts": [0.5], "segment_samples": 8}
TRAIN = {"epochs": 2, "batch_size": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """48 tiny images in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(16))
    return tmp_path


def project(folder: Path, encode: dict[str, object], train: dict[str, object] | None = None) -> Project:
    return Project.load(tiny.write_params(folder, encode=ENCODE | encode, train=TRAIN | (train or {})))


def objects(project: Project) -> dict[str, bytes]:
    assert project.remote is not None
    return {path: project.remote.objects.read(path) for path, _ in project.remote.objects.list("")}


def scores(run) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in run.history]


def test_a_run_from_a_bucket_is_the_run_from_a_disk(folder: Path, bucket: Bucket, caplog, monkeypatch) -> None:
    here = project(folder, {})
    assert encode_project(here)
    expected = train_project(here, "0.5", "here")
    local = tiny.files(folder / "data/activations")
    place = f"{bucket.url}/team"
    there = project(folder, {"store": place})
    assert encode_project(there)
    assert objects(there) == local
    words = [name for name in tiny.files(folder / "data/activations") if name not in local]
    assert words == ["0.5/elsewhere.json"], "what DVC sees of the stores there"
    run = train_project(there, "0.5", "there")
    assert scores(run) == scores(expected)
    assert run.identity == expected.identity

    named = CliRunner().invoke(recycle, ["train", "--cut", "0.5", "--store", place, "--set", "train.seed=1"])
    assert named.exit_code == 0, named.output
    assert json.loads(Path("results/runs/0.5-1/run.json").read_text())["overrides"]["encode.store"] == place
    assert open_run(here, "0.5-1").store.plain.where == f"{place}/0.5", "the run knows where its states lie"
    export_run(there, "there", folder / "exported")
    for text in (caplog.text, named.output, *map(str, tiny.files(folder / "results").values())):
        assert SECRET_KEY not in text
    assert not any(SECRET_KEY.encode() in data for data in tiny.files(folder).values())


def test_an_epoch_from_a_small_scratch_reads_each_segment_once(
    folder: Path, bucket: Bucket, caplog, monkeypatch
) -> None:
    assert encode_project(project(folder, {}))
    expected = train_project(project(folder, {}, {"shuffle": "window"}), "0.5", "here")
    assert expected.history
    place = {"store": f"{bucket.url}/team"}
    assert encode_project(project(folder, place))
    whole = sum(len(data) for name, data in tiny.files(folder / "data/activations").items() if "state." in name)
    small = {"scratch_gb": whole / 2 / 1e9, "epochs": 3}
    read: list[int] = []
    part = Objects.read_part

    def counted(self: Objects, path: str, begin: int, end: int) -> memoryview:
        read.append(end - begin)
        return part(self, path, begin, end)

    monkeypatch.setattr(Objects, "read_part", counted)
    with caplog.at_level(logging.INFO, "recycle"):
        run = train_project(project(folder, place, small), "0.5", "small")
    assert "batches are drawn from" in caplog.text
    assert len(run.history) == 3
    held = sum(path.stat().st_size for path in (folder / ".recycle/unpacked").rglob("*") if path.is_file())
    assert held <= whole / 2
    # The states of the validation samples are read before the first epoch too, and some for the example.
    assert sum(read) <= 1.1 * 3 * whole + whole / 2
    with pytest.raises(ConfigError, match=r"train\.shuffle is exact, for which all"):
        train_project(project(folder, place, small | {"shuffle": "exact"}), "0.5", "exact")


def test_a_killed_encode_is_continued(folder: Path, bucket: Bucket) -> None:
    tiny.write_images(folder / "photos", range(24))
    there = project(folder, {"store": f"{bucket.url}/team", "batch_size": 2, "segment_samples": 4})
    assert there.remote is not None
    process = tiny.recycle(folder, "encode")

    def segments() -> int:
        return sum(path.count("/") == 2 and path.endswith("zarr.json") for path, _ in there.remote.objects.list(""))

    try:
        while segments() < 3 and process.poll() is None:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert 3 <= segments() < 18
    before = objects(there)
    assert encode_project(there)
    after = objects(there)
    assert all(after[path] == data for path, data in before.items()), "what was there is the same"
    here = project(folder, {"batch_size": 2, "segment_samples": 4})
    assert encode_project(here)
    assert after == {
        name: data for name, data in tiny.files(folder / "data/activations").items() if "elsewhere" not in name
    }


def test_a_file_url_is_a_place_too(folder: Path) -> None:
    there = project(folder, {"store": f"file://{folder}/shared"}, {"epochs": 1})
    assert encode_project(there)
    assert train_project(there, "0.5").history
    done = CliRunner().invoke(recycle, ["store", "verify"])
    assert (done.exit_code, done.output) == (0, "sound\n")
    done = CliRunner().invoke(recycle, ["store", "verify", f"file://{folder}/shared/0.5"])
    assert (done.exit_code, done.output) == (0, "sound\n")
    told = CliRunner().invoke(recycle, ["store", "info"]).output
    assert told.startswith(f"file://{folder}/shared/0.5: 48 samples")
    assert "it has 48 of 48 samples" in told
    chunk = next((folder / "shared").rglob("state.*/c.*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    (chunk.parent / "notes").write_text("mine")
    done = CliRunner().invoke(recycle, ["store", "verify"])
    assert done.exit_code == 1
    assert "does not match its checksum, fetched 3 times" in done.output


@pytest.mark.parametrize("verb", [["gc"], ["compact"], ["rm-samples", "0" * 32]])
def test_verbs_that_change_a_store_refuse_one_elsewhere(folder: Path, verb: list[str]) -> None:
    there = project(folder, {"store": f"file://{folder}/shared"})
    assert encode_project(there)
    done = CliRunner().invoke(recycle, ["store", *verb, "--yes"])
    assert isinstance(done.exception, StoreError)
    assert str(done.exception).startswith(f"file://{folder}/shared: recycle store {verb[0]} changes only local stores")


def test_a_store_of_other_settings_stays(folder: Path) -> None:
    place = {"store": f"file://{folder}/shared"}
    assert encode_project(project(folder, place))
    with pytest.raises(StaleStoreError, match=r"others may use that store, so it stays: change encode\.store"):
        encode_project(project(folder, place | {"dtype": "float32"}))


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        ({"store": "bucket/x"}, "encode.store: 'bucket/x' is no place for stores"),
        ({"store": "s3://me:hush@bucket/x"}, "leave them out"),
        ({"store": "s3://b/x", "store_options": {"aws_secret_access_key": "hush"}}, "may be secret"),
        ({"store_options": {"region": "x"}}, "encode.store_options is set, but encode.store is not"),
    ],
)
def test_settings_that_cannot_be_used(folder: Path, encode: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        project(folder, encode)
    assert said in str(caught.value)
    assert "hush" not in str(caught.value)
