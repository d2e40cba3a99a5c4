"""Sources of records in tables: texts, pairs, and files that a table names or holds."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from source_contract import SourceContract, write_image

from pipeline.data import DataConfig, Source, open_source
from pipeline.errors import ConfigError, DataError

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


class TestAudioInATable(SourceContract):
    rows = 1

    def make(self, folder: Path) -> dict[str, Any]:
        (folder / "a.wav").write_bytes(b"sound")
        (folder / "t.jsonl").write_text('{"clip": "a.wav", "label": "bark"}')
        return {"source": "audio", "path": str(folder / "t.jsonl"), "audio": "clip", "label": "label"}

    def test_content_is_the_file(self, source: Source) -> None:
        assert source.content(0) == b"sound"


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
