"""A disk that is full, read-only or taken away: a clear error, whole segments, and the next run completes."""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forks
import pytest
import tiny

from pipeline.errors import StoreError
from pipeline.store import Reader, SegmentCache, Store, verify

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden/stores"
NOBODY = 65534
IMAGES, MORE_IMAGES = 12, 24
SIZES, MORE_SIZES = 2, 16
"""Sizes of full disks tried."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs, or becomes another user: needs root")


@pytest.fixture(scope="module")
def server() -> Iterator[forks.Server]:
    with forks.serving(*forks.COMMANDS, "test_disks") as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: forks.Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    make(folder, IMAGES)
    run(server, folder)
    return folder


def make(folder: Path, images: int) -> None:
    tiny.write_images(folder / "photos", range(images))
    tiny.write_params(folder, encode={"cuts": [0, 0.5], "segment_samples": 4, "batch_size": 4})


def run(server: forks.Server, folder: Path, *, user: int = 0) -> None:
    child = server.start(folder, "stages.cli:main", ["encode"], user=user)
    assert child.wait() == 0, child.said()


def refuse(server: forks.Server, folder: Path, reason: str, *, user: int = 0, start: forks.Child | None = None) -> None:
    """The run ends with exit code 1 and a message for people."""
    child = start or server.start(folder, "stages.cli:main", ["encode"], user=user, log="refused")
    assert child.wait() == 1, child.said()
    assert "Traceback" not in child.said()
    last = child.said().strip().splitlines()[-1]
    assert last.startswith("recycle: ")
    assert reason in last


def segments(folder: Path) -> dict[str, bytes]:
    """All files of the committed segments, which are proved whole."""
    found = {}
    for path in sorted((folder / "data/activations").glob("*/recipe.json")):
        store = Store.open(path.parent)
        assert verify(store) == []
        for one in store.segments():
            found |= {f"{path.parent.name}/{one}/{name}": data for name, data in tiny.files(store.path / one).items()}
    return found


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many KiB at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@needs_root
def test_a_full_disk(server: forks.Server, undisturbed: Path, tmp_path: Path, long: bool) -> None:
    expected = segments(undisturbed)
    pages = sum(-(-len(data) // 4096) for data in expected.values())  # a tmpfs gives whole ones
    draw = random.Random(0)
    for number in range(MORE_SIZES if long else SIZES):
        folder = tmp_path / str(number)
        make(folder, IMAGES)
        with mounted(folder / "data", draw.randrange(1, pages * 3 // 4) * 4):
            refuse(server, folder, "No space left on device")
            kept = segments(folder)
            assert kept.items() <= expected.items()
            refuse(server, folder, "No space left on device")
            assert segments(folder).items() >= kept.items()
            remount(folder / "data", "size=64m")
            run(server, folder)
            assert tiny.files(folder / "data") == tiny.files(undisturbed / "data")


@needs_root
def test_a_disk_that_becomes_read_only(server: forks.Server, undisturbed: Path, tmp_path: Path) -> None:
    make(tmp_path, IMAGES // 2)
    with mounted(tmp_path / "data", 1 << 16):
        run(server, tmp_path)
        kept = segments(tmp_path)
        make(tmp_path, IMAGES)
        remount(tmp_path / "data", "ro")
        refuse(server, tmp_path, "Read-only file system")
        assert segments(tmp_path) == kept
        remount(tmp_path / "data", "rw")
        run(server, tmp_path)
        assert segments(tmp_path).items() > kept.items()


@needs_root
def test_permission_denied(server: forks.Server) -> None:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))  # pytest's own folders are closed to other users
    try:
        folder.chmod(0o755)
        make(folder, IMAGES // 2)
        subprocess.run(["chown", "-R", str(NOBODY), folder], check=True)
        run(server, folder, user=NOBODY)
        kept = segments(folder)
        make(folder, IMAGES)
        for store in (folder / "data/activations").iterdir():
            store.chmod(0o555)
        refuse(server, folder, "Permission denied", user=NOBODY)
        assert segments(folder) == kept
        for store in (folder / "data/activations").iterdir():
            store.chmod(0o755)
        run(server, folder, user=NOBODY)
        assert segments(folder).items() > kept.items()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["renamed", "removed"])
@pytest.mark.parametrize("what", ["data/activations/0.5", "data/activations", "data"])
def test_a_folder_that_vanishes_under_the_run(
    server: forks.Server, undisturbed: Path, how: str, what: str, tmp_path: Path
) -> None:
    make(tmp_path, MORE_IMAGES)
    child = server.start(tmp_path, "stages.cli:main", ["encode"], log="vanished")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data/activations/0.5").glob("[0-9a-f]*/zarr.json")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    if how == "renamed":
        (tmp_path / what).rename(tmp_path / "gone")
    else:
        while (tmp_path / what).exists() and time.monotonic() < deadline:
            shutil.rmtree(tmp_path / what, ignore_errors=True)  # again, where a writer made something meanwhile
    refuse(server, tmp_path, "data/activations", start=child)
    segments(tmp_path)
    run(server, tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole, MORE_IMAGES)
    run(server, whole)
    assert tiny.files(tmp_path / "data/activations") == tiny.files(whole / "data/activations")


def unpack(store: str, scratch: str) -> None:
    """The body of a child: what is written to a map on a full disk kills."""
    opened = Store.open(Path(store))
    try:
        Reader(opened.path, cache=SegmentCache(Path(scratch))).gather(opened.rows(opened.keys()[:1]))
    except StoreError as error:
        print(error)
        raise SystemExit(1) from error


@needs_root
def test_a_full_scratch(server: forks.Server, tmp_path: Path) -> None:
    (wide,) = [path.parent.parent for path in GOLDEN.glob("zstd/*/state.x/c.1.0")]
    store = tmp_path / "store"
    shutil.copytree(wide, store / wide.name)
    shutil.copy(wide.parent / "recipe.json", store)
    with mounted(tmp_path / "scratch", 4096):
        full = server.start(tmp_path, "test_disks:unpack", str(store), str(tmp_path / "scratch"))
        assert full.wait() == 1, full.said()
        assert "No space left on device" in full.said()
        assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
        remount(tmp_path / "scratch", "size=64m")
        again = server.start(tmp_path, "test_disks:unpack", str(store), str(tmp_path / "scratch"))
        assert again.wait() == 0, again.said()
