"""Stores shared through DVC remotes: what travels, and what a colleague can do who has nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
import tiny
import torch
from obstore.store import from_url
from safetensors.torch import save_file
from services.s3 import Bucket
from services.ssh import Host
from test_dvc import ROOT, commit, run, stages

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
    run(folder, "dvc", "repro", "train@0.5")
    commit(folder)
    run(folder, "git", "tag", "v1")
    for label, name in enumerate(tiny.CLASSES):
        (folder / "photos" / name / "new.png").write_bytes(tiny.draw(label, 99))
    run(folder, "dvc", "repro", "--single-item", "encode")
    commit(folder)
    run(folder, "git", "tag", "v2")
    return folder


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
    assert "training goes on from the pretrained weights that data/activations/0.5 carries" in said
    now = json.loads((there / "results/runs/0.5/metrics.json").read_text())
    assert {n: v for n, v in flat(was).items() if "seconds" not in n} == {
        n: v for n, v in flat(now).items() if "seconds" not in n
    }
    said = run(there, "dvc", "exp", "run", "--allow-missing", "--set-param", "train.lr=0.02", "train@0.5")
    assert stages(said) == ["train@0.5"], "encode is known to be up to date, though its images are not here"


def flat(metrics: object, path: str = "") -> dict[str, object]:
    """Values of nested metrics by their paths."""
    if not isinstance(metrics, dict):
        return {path: metrics}
    return {name: value for key, inner in metrics.items() for name, value in flat(inner, f"{path}/{key}").items()}
