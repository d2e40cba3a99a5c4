"""Stores shared through DVC remotes: what travels, and what a colleague can do who has nothing else."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import obstore
import pytest
import tiny
import torch
from obstore.store import from_url
from safetensors.torch import save_file
from services.s3 import Bucket
from services.ssh import Host
from test_dvc import ROOT, commit, run, set_param, stages

from pipeline.errors import ConfigError, StoreError
from pipeline.project import Project
from pipeline.store import SUFFIX, Reader, Store, read_attachment, write_attachment
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")]
SHARED = ("data/activations", "data/samples.parquet")


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that encoded 57 images and trained (v1), then encoded 3 more (v2); it alone has images and weights."""
    folder = tmp_path_factory.mktemp("owner")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    (folder / ".gitignore").write_text(".recycle/\n/photos\n/net.safetensors\n")
    tiny.write_images(folder / "photos", range(19))
    torch.manual_seed(3)
    save_file(tiny.ConvNet(3).state_dict(), folder / "net.safetensors")
    tiny.write_params(
        folder,
        data={"fraction": 1.0, "seed": 0},
        model={"weights": "net.safetensors"},
        preprocess={"kind": "image", "image_size": 64},
        encode={"cuts": [0.5], "codec": "raw", "dtype": "float16", "precision": "float32", "views": None},
        train={"epochs": 1},
    )
    commit(folder)
    with chdir(folder):
        assert encode_project(Project.load(Path("params.yaml")))
        train_project(Project.load(Path("params.yaml")), "0.5")
        keep(folder, "v1", "encode", "train@0.5")
        for label, name in enumerate(tiny.CLASSES):
            (folder / "photos" / name / "new.png").write_bytes(tiny.draw(label, 99))
        assert encode_project(Project.load(Path("params.yaml")))
        keep(folder, "v2", "encode")
    return folder


def keep(folder: Path, tag: str, *stages: str) -> None:
    """Let DVC and git know what was made, as `dvc repro` would have."""
    run(folder, "dvc", "commit", "--force", *stages)
    commit(folder)
    run(folder, "git", "tag", tag)


@pytest.fixture(params=["local", "s3", "ssh"])
def remote(request: pytest.FixtureRequest, owner: Path, tmp_path: Path) -> Callable[[], int]:
    """The owner's default remote: a new one of each kind; gives the bytes that lie there."""
    place = tmp_path / "remote"
    url, settings = str(place), dict[str, str]()

    def measure() -> int:
        return sum(len(data) for data in tiny.files(place).values())

    if request.param == "ssh":
        host: Host = request.getfixturevalue("ssh_host")
        url, settings = host.url(place), {"keyfile": str(host.key)}
    elif request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        url, settings = f"{bucket.url}/stores", {"endpointurl": bucket.endpoint, "region": "us-east-1"}

        def measure() -> int:
            return sum(one["size"] for page in obstore.list(from_url(bucket.url)) for one in page)

    run(owner, "git", "checkout", "--quiet", "v1")
    run(owner, "dvc", "remote", "add", "--default", "--force", "store", url)
    for name, value in settings.items():
        run(owner, "dvc", "remote", "modify", "store", name, value)
    return measure


def clone(owner: Path, revision: str, to: Path) -> Path:
    """A colleague's clone of a revision, who is told of the remote, as a commit of its configuration would."""
    run(to.parent, "git", "clone", "--quiet", "--branch", revision, str(owner), to.name)
    shutil.copy(owner / ".dvc/config", to / ".dvc/config")
    return to


def test_only_what_is_new_travels_and_arrives(owner: Path, remote: Callable[[], int], tmp_path: Path) -> None:
    run(owner, "dvc", "push", *SHARED)
    before = remote()
    run(owner, "git", "checkout", "--quiet", "v2")
    run(owner, "dvc", "push", *SHARED)
    assert 0.05 < remote() / before - 1 <= 0.06, "three of 57 samples are 5.3 %"
    there = clone(owner, "v2", tmp_path / "colleague")
    run(there, "dvc", "pull", *SHARED)
    run(owner, "dvc", "checkout", *SHARED)
    assert tiny.files(there / "data/activations") == tiny.files(owner / "data/activations")


@pytest.mark.parametrize("remote", ["local"], indirect=True)
def test_a_clone_trains_without_raw_data_and_without_the_model(
    owner: Path, remote: Callable[[], int], tmp_path: Path
) -> None:
    run(owner, "dvc", "push", *SHARED)
    there = clone(owner, "v1", tmp_path / "colleague")
    run(there, "dvc", "pull", *SHARED)
    assert not (there / "photos").exists()
    assert not (there / "net.safetensors").exists()
    was = json.loads((there / "results/runs/0.5/metrics.json").read_text())
    said = run(there, "dvc", "repro", "--single-item", "--force", "train@0.5")
    assert stages(said) == ["train@0.5"]
    assert "the pretrained weights that data/activations/0.5 carries are used" in said
    now = json.loads((there / "results/runs/0.5/metrics.json").read_text())
    assert {n: v for n, v in flat(was).items() if "seconds" not in n} == {
        n: v for n, v in flat(now).items() if "seconds" not in n
    }
    set_param(there, "train", "lr", 0.02)
    said = run(there, "dvc", "repro", "--dry", "--allow-missing", "train@0.5")
    assert stages(said) == ["train@0.5"], "encode is known to be up to date, though its images are not here"


def test_states_are_read_from_the_remote_where_they_are(
    owner: Path, remote: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(owner, "dvc", "push", *SHARED)
    monkeypatch.chdir(clone(owner, "v2", tmp_path / "colleague"))
    project = Project.load(Path("params.yaml"), {"encode.store": "dvc://v1:data/activations"})
    store = project.open_store(0.5)
    keys = store.keys()
    run(owner, "dvc", "checkout", *SHARED)
    own = Store.open(owner / "data/activations/0.5")
    assert store.segments() == own.segments()
    read = project.reader(store.path).gather(store.rows(keys))
    expected = Reader(own.path).gather(own.rows(keys))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    folder, _ = read_attachment(store, SUFFIX) or (Path(), {})
    assert tiny.files(folder).items() >= tiny.files(own.path / "suffix").items()
    assert not project.activations.exists()
    assert not Path(".dvc/cache").exists(), "nothing is kept twice"
    with pytest.raises(StoreError, match="what DVC tracks is read only; encode into a folder, then dvc push"):
        write_attachment(store, SUFFIX, {}, lambda folder: None)


@pytest.mark.parametrize("remote", ["local"], indirect=True)
def test_training_without_a_checkout(
    owner: Path, remote: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(owner, "dvc", "push", *SHARED)
    there = clone(owner, "v1", tmp_path / "colleague")
    run(there, "dvc", "pull", "data/samples.parquet")
    monkeypatch.chdir(there)
    was = json.loads(Path("results/runs/0.5/run.json").read_text())
    now = train_project(Project.load(Path("params.yaml"), {"encode.store": "dvc://v1:data/activations"}), "0.5")
    assert now.identity == was["identity"]
    assert now.value == was["value"]
    assert [row["train/loss"] for row in now.history] == [row["train/loss"] for row in was["history"]]
    assert not Path("data/activations").exists()


@pytest.mark.parametrize("remote", ["local"], indirect=True)
def test_what_cannot_be_read_is_told_in_a_line(
    owner: Path, remote: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = clone(owner, "v1", tmp_path / "colleague")
    monkeypatch.chdir(there)

    def said(url: str) -> str:
        with pytest.raises((ConfigError, StoreError)) as caught:
            Project.load(Path("params.yaml"), {"encode.store": url}).open_store(0.5).keys()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "git knows no revision 'v9' here" in said("dvc://v9:data/activations")
    assert "data/photos is no output that DVC tracks at v1" in said("dvc://v1:data/photos")
    assert "DVC knows no folder there" in said("dvc://v1:data/samples.parquet")
    assert "DVC has no remote 'other'" in said("dvc://v1:data/activations?remote=other")
    assert "expected dvc://REVISION:PATH" in said("dvc://data/activations")
    assert "is not there; mount it" in said("dvc://v1:data/activations")
    assert not (tmp_path / "remote").exists(), "to read makes no folder"
    run(owner, "dvc", "push", "data/samples.parquet")
    assert "whoever has it: dvc push" in said("dvc://v1:data/activations")
    run(owner, "dvc", "push", *SHARED)
    assert "no store is here" in said("dvc://v1:data/activations/elsewhere")
    for place in (tmp_path / "remote").rglob("*"):
        if place.is_file() and place.stat().st_size > 100_000:
            place.unlink()
    assert "is not on DVC's remote store" in said("dvc://v1:data/activations")
    run(there, "dvc", "remote", "remove", "store")
    assert "DVC has no default remote" in said("dvc://v1:data/activations")
    monkeypatch.chdir(tmp_path)
    shutil.copy(there / "params.yaml", tmp_path)
    assert "is in no DVC project" in said("dvc://v1:data/activations")


def flat(metrics: object, path: str = "") -> dict[str, object]:
    """Values of nested metrics by their paths."""
    if not isinstance(metrics, dict):
        return {path: metrics}
    return {name: value for key, inner in metrics.items() for name, value in flat(inner, f"{path}/{key}").items()}
