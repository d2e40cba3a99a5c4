"""Every file below data.path is a sample, or counted and named."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_contract import write_image

from pipeline.data import DataConfig, Source, open_source
from pipeline.data.media import AudioFolder
from pipeline.data.source import LeftOut
from pipeline.data.walk import files_by_split, is_hidden
from pipeline.errors import DataError


def names(source: Source) -> list[str]:
    return [source.row(i).source for i in range(len(source))]


def image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


def images(folder: Path, *, labelled: bool = True) -> Source:
    return open_source(DataConfig(source="images", path=str(folder), labelled=labelled))


def test_files_are_known_by_extension_or_by_their_first_bytes(tmp_path: Path) -> None:
    files = {"a.JFIF": "JPEG", "b.jpe": "JPEG", "c": "PNG", "d.dat": "WEBP", "e.bak": "GIF", "f.image": "BMP"}
    for name, kind in files.items():
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(image(kind))
    (tmp_path / "cat/g.txt").write_text("BM is no image")
    (tmp_path / "cat/h.nef").write_bytes(image("TIFF"))
    (tmp_path / "cat/i").touch()
    source = images(tmp_path)
    assert names(source) == [f"cat/{name}" for name in files]
    assert source.left_out() == {
        ".txt": (1, "cat/g.txt"),
        ".nef": (1, "cat/h.nef"),
        "without extension": (1, "cat/i"),
    }


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".Trash-1000", "__MACOSX", "@eaDir", "$RECYCLE.BIN"])
@pytest.mark.parametrize("place", ["", "cat", "cat/deep"])
@pytest.mark.parametrize("labelled", [True, False])
def test_hidden_folders_are_no_data(tmp_path: Path, hidden: str, place: str, labelled: bool) -> None:
    write_image(tmp_path / "cat/deep/a.png", 1)
    write_image(tmp_path / place / hidden / "dog/b.png", 2)
    source = images(tmp_path, labelled=labelled)
    assert names(source) == ["cat/deep/a.png"]
    assert source.left_out() == {"hidden": (1, f"{place}/{hidden}".lstrip("/"))}


@pytest.mark.parametrize("name", ["._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes"])
def test_hidden_files(name: str) -> None:
    assert is_hidden(name)
    assert not is_hidden(name.strip("._") + ".png")


def test_what_lies_beside_the_classes_is_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / split / "cat/a.png", 1)
    write_image(tmp_path / "train/beside.png", 1)
    (tmp_path / "README.md").touch()
    (tmp_path / "train/dog").mkdir()
    assert str(images(tmp_path).left_out()) == (
        "1 outside of the split folders (first: README.md), 1 outside of the class folders (first: train/beside.png), "
        "1 class folders without images (first: train/dog)"
    )
    write_image(tmp_path / "flat/a.png", 1)
    with pytest.raises(DataError, match=r"holds no images .*; left out: 1 outside of the class folders \("):
        images(tmp_path / "flat")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere/more/b.png", 1)
    write_image(tmp_path / "set/cat/a.png", 2)
    for name, target in {"set/cat/link": "elsewhere", "set/dog": "elsewhere/more", "set/cat/back": "set"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    source = images(tmp_path / "set")
    assert names(source) == ["cat/a.png", "cat/link/more/b.png", "dog/b.png"]
    assert source.left_out() == {"links to a folder they lie in": (1, "cat/back")}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_sample(tmp_path: Path) -> None:
    write_image(tmp_path / "cat/a.png", 1)
    os.mkfifo(tmp_path / "cat/b.png")
    assert images(tmp_path).left_out() == {"neither file nor folder": (1, "cat/b.png")}


def test_known_sounds_are_decoded() -> None:
    soundfile = pytest.importorskip("soundfile")
    kinds = {"AIFF", "AU", "CAF", "FLAC", "MP3", "OGG", "RF64", "W64", "WAV"}
    assert kinds <= soundfile.available_formats().keys()
    for kind in sorted(kinds - {"MP3", "W64"}):  # their first bytes are too weak a sign
        stream = io.BytesIO()
        soundfile.write(stream, np.zeros(1000), 8000, format=kind)
        assert AudioFolder.signature.match(stream.getvalue()), kind


def write_tables(folder: Path, *files: str) -> list[str]:
    """Write a record into each of `files`; return those that a data set reads, in its order."""
    for number, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"t{number}", "label": "ab"[number % 2]}) + "\n")
    source = open_source(DataConfig(source="text", path=str(folder), text="text", label="label"))
    return [f"{source.row(i).source} {source.row(i).split}" for i in range(len(source))]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"], [2, 1, 0]),
        (["train-00010-of-00011.jsonl", *(f"train-{i:05}-of-00011.jsonl" for i in range(10))], [*range(1, 11), 0]),
        (["data/test-0-of-2-0123456789abcdef.jsonl", "data/test-1-of-2-fedcba9876543210.jsonl"], [0, 1]),
        (["train.10.jsonl", "train.9.jsonl", "train.8.jsonl"], [2, 1, 0]),
        (["part-1-of-2-train.jsonl", "part-2-of-2-train.jsonl"], [0, 1]),
        (["train/0000.jsonl", "train/0001.jsonl", "validation/0000.jsonl"], [0, 1, 2]),
        (["dev-v1.1.jsonl", "train-v1.1.jsonl"], [0, 1]),
    ],
    ids=str,
)
def test_shards_are_joined_in_their_order(tmp_path: Path, files: list[str], expected: list[int]) -> None:
    found = write_tables(tmp_path, *files)
    assert [name.split("#")[0] for name in found] == [files[number] for number in expected]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00-of-03.jsonl", "train-02-of-03.jsonl"], r"1 shards .* missing \(train-01-of-03\.jsonl\)"),
        (["train-00000-of-00002.jsonl"], r"missing \(train-00001-of-00002\.jsonl\); 1 are there; fetch the others"),
        (["data/train-2-of-2.jsonl"], r"missing \(data/train-1-of-2\.jsonl\)"),
        (["train.1.jsonl", "train.3.jsonl"], r"missing \(train\.2\.jsonl\)"),
        (["train.jsonl", "train-extra.jsonl"], "are both the train split, and no shards of each other .*; join them"),
        (["train.1.jsonl", "train.01.jsonl"], "are both the train split"),
        (["dev-v1.1.jsonl", "dev-v2.0.jsonl"], "are both the validation split"),
    ],
    ids=str,
)
def test_shards_that_are_missing_or_none_are_told(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_tables(tmp_path, *files)


def test_other_files_of_a_folder_are_counted(tmp_path: Path) -> None:
    for name in ("train.jsonl", "README.md", ".gitattributes", "labels.jsonl", "old/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    left_out = LeftOut()
    assert files_by_split(tmp_path, left_out, (".jsonl",)) == [(tmp_path / "train.jsonl", "train")]
    assert left_out == {
        "hidden": (1, ".gitattributes"),
        ".md": (1, "README.md"),
        "not called after a split": (1, "labels.jsonl"),
        "folders": (1, "old"),
    }
