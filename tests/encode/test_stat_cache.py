"""Files that did not change are not read again; whatever is wrong with the cache costs reading them, no more."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import DataConfig, Stamp, open_source
from pipeline.data.media import ImageFolder
from pipeline.encode import keying
from pipeline.encode.keying import KeyedSamples, StatCache, key_contents

OLD = 1_600_000_000
FILES = 12


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Twelve old files in two classes, in the current directory; the list has the files that were read."""
    monkeypatch.chdir(tmp_path)
    for number in range(FILES):
        write(tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png", f"image {number:02}")
    read: list[str] = []
    content = ImageFolder.content

    def told(source: ImageFolder, i: int) -> bytes:
        read.append(source.row(i).source)
        return content(source, i)

    monkeypatch.setattr(ImageFolder, "content", told)
    return read


def write(path: Path, text: str, seconds: int = OLD) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (seconds, seconds))


def keyed(cache: StatCache | None = None, *, trust: bool = True) -> KeyedSamples:
    source = open_source(DataConfig(source="images", path="photos"))
    return key_contents(source, workers=2, cache=cache or StatCache(Path(".recycle/keys.sqlite")), trust=trust)


def key_of(found: KeyedSamples, row: int) -> bytes:
    return found.keys[row].tobytes()


def test_unchanged_files_are_not_read_and_have_the_same_keys(reads: list[str]) -> None:
    first = keyed()
    assert len(reads) == FILES
    second = keyed()
    assert len(reads) == FILES
    assert np.array_equal(first.keys, second.keys)
    assert np.array_equal(first.sizes, second.sizes)
    assert second.bad == []


def test_a_known_file_whose_row_is_bad_has_no_key(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    keyed()
    row = ImageFolder.row
    monkeypatch.setattr(
        ImageFolder, "row", lambda source, i: row(source, i)._replace(source="\udcff" if not i else "x")
    )
    found = keyed()
    assert len(reads) == FILES
    assert [sample.row for sample in found.bad] == [0]
    assert not found.keys[0].any()
    assert found.keys[1].any()
    assert (found.sizes[0], found.sizes[1] > 0) == (0, True)


def test_a_changed_file_is_read(reads: list[str]) -> None:
    first = keyed()
    reads.clear()
    write(Path("photos/a/00.png"), "another", OLD)  # of another size
    write(Path("photos/b/01.png"), "other 01", OLD + 1)  # of another mtime
    again = Path("photos/a/02.png")
    write(again.with_suffix(".new"), "other 02", OLD)  # another inode
    again.with_suffix(".new").rename(again)
    second = keyed()
    assert sorted(reads) == ["a/00.png", "a/02.png", "b/01.png"]
    assert sum(key_of(first, row) != key_of(second, row) for row in range(FILES)) == 3


def test_rehash_distrusts_and_renews(reads: list[str]) -> None:
    first = keyed()
    write(Path("photos/a/00.png"), "IMAGE 00")  # in place, and dated back: nothing tells
    assert key_of(keyed(), 0) == key_of(first, 0)
    reads.clear()
    distrusted = keyed(trust=False)
    assert len(reads) == FILES
    assert key_of(distrusted, 0) != key_of(first, 0)
    assert np.array_equal(keyed().keys, distrusted.keys)
    assert len(reads) == FILES


def test_a_file_that_may_still_change_unseen_is_not_trusted(reads: list[str]) -> None:
    os.utime("photos/a/00.png")
    keyed()
    reads.clear()
    keyed()
    assert reads == ["a/00.png"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = ImageFolder.content

    def overtaken(source: ImageFolder, i: int) -> bytes:
        read = content(source, i)
        if i == 0:
            write(Path("photos/a/00.png"), "overtook", OLD + 1)
        return read

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "content", overtaken)
        stale = keyed()
    write(Path("photos/a/00.png"), "overtook")  # as if dated back to what it was before
    assert key_of(keyed(), 0) != key_of(stale, 0)


def test_deleting_it_costs_reading(reads: list[str]) -> None:
    first = keyed()
    Path(".recycle/keys.sqlite").unlink()
    assert np.array_equal(keyed().keys, first.keys)
    assert len(reads) == 2 * FILES


@pytest.mark.parametrize("damage", ["text", "torn"])
def test_a_corrupt_one_is_a_warning_and_made_anew(
    reads: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = keyed()
    file = Path(".recycle/keys.sqlite")
    whole = file.read_bytes()
    file.write_bytes(b"no database " * 500 if damage == "text" else whole[:4096] + b"\xff" * (len(whole) - 4096))
    reads.clear()
    assert np.array_equal(keyed().keys, first.keys)
    assert "files are read again; it is safe to delete" in caplog.text
    assert len(reads) == FILES
    caplog.clear()
    keyed()
    assert len(reads) == FILES
    assert caplog.text == ""


def test_a_locked_one_is_a_warning(
    reads: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keyed()
    monkeypatch.setattr(keying, "WAIT_SECONDS", 0.01)
    other = sqlite3.connect(".recycle/keys.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    assert np.array_equal(keyed().keys, first.keys)
    assert "database is locked" in caplog.text
    other.close()
    reads.clear()
    keyed()
    assert reads == []


def test_where_none_can_be_made_all_is_read(reads: list[str], caplog: pytest.LogCaptureFixture) -> None:
    Path("file").touch()
    for path in (Path("file/keys.sqlite"), Path()):
        assert keyed(StatCache(path)).bad == []
    assert len(reads) == 2 * FILES
    assert "cannot be used" in caplog.text


def test_keys_of_another_key_function_are_not_served(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    keyed()
    with monkeypatch.context() as patch:
        patch.setattr(keying, "VERSION", keying.VERSION ^ 1)
        reads.clear()
        keyed()
        assert len(reads) == FILES
        keyed()
        assert len(reads) == FILES


def test_files_that_are_gone_are_forgotten_and_those_of_another_data_set_are_not(reads: list[str]) -> None:
    keyed()
    cache = StatCache(Path(".recycle/keys.sqlite"))
    other = Path("elsewhere.png")
    write(other, "elsewhere")
    cache.update([(Stamp.of(other), bytes(16))], [])
    Path("photos/a/00.png").unlink()
    Path("photos/b/01.png").rename("photos/a/01.png")
    keyed()
    with sqlite3.connect(".recycle/keys.sqlite") as connection:
        known = {os.fsdecode(path) for (path,) in connection.execute("SELECT path FROM files")}
    connection.close()
    assert len(known) == FILES - 1 + 1
    assert {"photos/a/01.png", "elsewhere.png"} <= known
    assert not {"photos/a/00.png", "photos/b/01.png"} & known


def test_any_name_and_any_number_can_be_remembered(tmp_path: Path) -> None:
    cache = StatCache(tmp_path / "keys.sqlite")
    stamps = [Stamp(os.fsdecode(b"\xff'.png"), 1, OLD, 2**64 - 1), Stamp("far.png", 2**40, 10**20, 0)]
    keys = [bytes([number] * 16) for number in range(2)]
    cache.update(list(zip(stamps, keys, strict=True)), stamps)
    assert cache.find([None, *stamps]) == {1: keys[0], 2: keys[1]}


def test_several_processes_may_use_it_at_once(tmp_path: Path) -> None:
    stamps = [Stamp(f"{number}.png", number, OLD, number) for number in range(40)]

    def use(number: int) -> dict[int, bytes]:
        cache = StatCache(tmp_path / "keys.sqlite")  # a connection of its own, as a process has
        cache.update([(stamps[number], bytes([number] * 16))], stamps)
        return cache.find([stamps[number]])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(40))) == [{0: bytes([number] * 16)} for number in range(40)]
    assert len(StatCache(tmp_path / "keys.sqlite").find(stamps)) == 40


def test_what_is_no_file_leaves_none_behind(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", np.zeros((3, 4, 4), np.uint8))
    np.save(tmp_path / "digits.labels.npy", np.zeros(3, np.int64))
    source = open_source(DataConfig(source="arrays", path=str(tmp_path / "digits.npy")))
    key_contents(source, workers=1, cache=StatCache(tmp_path / "keys.sqlite"))
    assert not (tmp_path / "keys.sqlite").exists()
