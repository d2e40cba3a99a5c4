"""Wrong settings and broken files are answered with what is there."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.data import DataConfig, open_source
from pipeline.errors import BadSampleError, ConfigError, DataError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": "a"}) for text in ("one", "", "three")))
    return path


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        (
            {"source": "video", "path": "x"},
            ["source is 'video'", "images, audio, text, pairs, conll, tagged, squad, pixels, arrays, torch"],
        ),
        ({"source": "torchvision", "path": "x"}, ["name is not set; source torchvision needs it"]),
        ({"source": "images", "path": "x", "download": True}, ["download is True, which source images does not use"]),
        ({"source": "arrays", "path": "x", "label": ["a", "b"]}, ["only tables have several fields"]),
        (
            {"source": "text", "path": "x", "text": "t", "label": ["a", "b"], "delimiter": "|"},
            ["only tables have several fields, and without a delimiter"],
        ),
        ({"source": "images"}, ["path is not set; source images needs it"]),
        (
            {"source": "pairs", "path": "x", "anchor": "q", "text": "t"},
            ["text is 't', which source pairs does not use", "positive is not set"],
        ),
        ({"source": "text", "path": "x", "text": "t", "label": -1}, ["label is -1; source text names its field"]),
        ({"source": "pixels", "path": "x", "shape": [2, 3, 4]}, [re.escape("shape is [2, 3, 4]; expected positive")]),
    ],
)
def test_settings_that_do_not_fit_each_other_are_all_told(settings: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        DataConfig(**settings)
    for fault in faults:
        assert re.search(fault, str(error.value))


@pytest.mark.parametrize("settings", [{"validation": 1.0}, {"sha256": "abc"}, {"seed": -1}, {"hold_out": "folds"}])
def test_bounds(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(source="images", path="x", **settings)


def test_every_setting_is_documented() -> None:
    assert [name for name, field in DataConfig.model_fields.items() if not field.description] == []


def test_wrong_field_names_those_that_exist(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.label is 'lable'; .* has the fields text, label"):
        open_source(DataConfig(source="text", path=str(table), text="text", label="lable"))


def test_digest_is_checked_first(table: Path) -> None:
    settings = {"source": "text", "path": str(table), "text": "text", "label": "label"}
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    assert len(open_source(DataConfig(**settings, sha256=digest))) == 3
    table.write_text("not even json")
    with pytest.raises(ConfigError, match=r"data\.sha256"):
        open_source(DataConfig(**settings, sha256=digest))


def test_an_empty_text_is_one_bad_sample(table: Path) -> None:
    source = open_source(DataConfig(source="text", path=str(table), text="text", label="label"))
    with pytest.raises(BadSampleError, match=r"no text: t\.jsonl#1, text, has ''; expected a text"):
        source.content(1)
    assert source.content(2) == "three"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": ', "line 2: not JSON"),
        ("t.jsonl", "[1]\n", "record 0 is list; expected an object"),
        ("t.jsonl", "", "holds no records"),
        ("t.json", '{"a": [], "b": []}', r"data\.records is None; .* keys a, b"),
        ("t.json", "{", "cannot be read as .json"),
        ("t.jsonl", '{"text": "a", "label": null}', "1 records have no label"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}', "field label mixes types"),
        ("t.csv", "text,label\n", "holds no records"),
        ("t.csv", "text,label\na,b,c\n", "cannot be read as .csv"),
        ("t.parquet", "text", "cannot be read as .parquet"),
        ("t.xml", "<a/>", r"ends in \.csv"),
    ],
)
def test_broken_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((ConfigError, DataError), match=message):
        open_source(DataConfig(source="text", path=str(tmp_path / name), text="text", label="label"))


def test_unknown_split_is_told_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label,part\na,b,training\nc,d,third\n")
    settings = {"text": "text", "label": "label", "split": "part"}
    source = open_source(DataConfig(source="text", path=str(tmp_path / "t.csv"), **settings))
    assert source.row(0).split == "train"
    with pytest.raises(DataError, match=r"t\.csv#1: split 'third'; expected one of train, validation, test"):
        source.row(1)


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ("1,2,3,4,0", {"shape": [2, 3]}, r"data\.shape is \[2, 3\], 6 pixels; .* has 4"),
        ("1,2,0", {}, "no square image; set data.shape"),
        ("1,2,300,4,0", {}, r"holds 300\.\.300; pixels of a table are whole numbers in 0\.\.255"),
        ("1,2,0.5,4,0", {}, "holds double"),
        ("1,2,,4,0\n1,2,3,4,0", {}, "1 of them empty"),
        ("1,2,3,4,0", {"label": "digit"}, "5 columns without names"),
        ("a,b,c,d,e\n1,2,3,4,0", {"label": "digit"}, "has the columns a, b, c, d, e"),
        ("1,2,3,4,0", {"label": 5}, "has 5 columns"),
    ],
)
def test_broken_pixel_tables(tmp_path: Path, lines: str, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "p.csv").write_text(lines + "\n")
    with pytest.raises((ConfigError, DataError), match=message):
        open_source(DataConfig(source="pixels", path=str(tmp_path / "p.csv"), **settings))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "p.npz", x=np.array([object], object), y=np.zeros(1))
    for name in ("p.npy", "p.npz"):
        with pytest.raises(DataError, match="cannot be read"):
            open_source(DataConfig(source="arrays", path=str(tmp_path / name)))


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", x=np.zeros((3, 2, 2)), y=np.zeros(2))
    with pytest.raises(DataError, match=r"samples \(3, 2, 2\), labels \(2,\)"):
        open_source(DataConfig(source="arrays", path=str(tmp_path / "p.npz")))
    with pytest.raises(ConfigError, match=r"data\.label is 'z'; .* holds x, y"):
        open_source(DataConfig(source="arrays", path=str(tmp_path / "p.npz"), label="z"))
    np.save(tmp_path / "p.npy", np.zeros((3, 2, 2)))
    with pytest.raises(ConfigError, match=r"p\.labels\.npy is missing"):
        open_source(DataConfig(source="arrays", path=str(tmp_path / "p.npy")))
    np.save(tmp_path / "p.labels.npy", np.zeros(3))
    np.save(tmp_path.parent / "outside.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"data\.group: .*; \.\./outside\.npy is missing beside it"):
        open_source(DataConfig(source="arrays", path=str(tmp_path / "p.npy"), group="../outside.npy"))
    np.savez(tmp_path / "g.npz", x=np.zeros((3, 2)), y=np.zeros(3), who=np.zeros(2))
    with pytest.raises(DataError, match=r"data\.group has shape \(2,\); expected \(3,\)"):
        open_source(DataConfig(source="arrays", path=str(tmp_path / "g.npz"), group="who"))
    with pytest.raises(ConfigError, match=r"source pixels reads tables; set data\.source: arrays"):
        open_source(DataConfig(source="pixels", path=str(tmp_path / "p.npz")))
    with pytest.raises(ConfigError, match=r"expected \.npy or \.npz"):
        open_source(DataConfig(source="arrays", path=str(tmp_path)))


def test_image_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        open_source(DataConfig(source="images", path=str(tmp_path)))
    for name in ("train", "validation", "spare"):
        (tmp_path / name / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"split folders \(train, validation\) and beside them spare"):
        open_source(DataConfig(source="images", path=str(tmp_path)))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"data\.image is not set; .* is a table; name the field, or give a folder"):
        open_source(DataConfig(source="images", path=str(file)))
    with pytest.raises(ConfigError, match=r"data\.label is 'kind', which is for tables; .* is a folder of classes"):
        open_source(DataConfig(source="images", path=str(tmp_path), label="kind"))


@pytest.mark.parametrize("path", ["../out.png", "/etc/passwd", "a/../../out.png", "c:\\\\out.png", "..\\\\out.png"])
def test_paths_in_a_table_stay_below_its_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"file": "a.png", "kind": 1}}\n{{"file": "{path}", "kind": 1}}\n')
    settings = {"source": "images", "image": "file", "label": "kind"}
    with pytest.raises(DataError, match=r"t\.jsonl#1: image is .*; expected one relative to .*, below it"):
        open_source(DataConfig(path=str(tmp_path / "t.jsonl"), **settings))


def test_files_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"file": "gone.png", "kind": 1}\n{"file": null, "kind": 1}\n')
    settings = {"source": "images", "path": str(tmp_path / "t.jsonl"), "image": "file", "label": "kind"}
    source = open_source(DataConfig(**settings))
    with pytest.raises(BadSampleError, match="cannot be read: No such file"):
        source.content(0)
    with pytest.raises(BadSampleError, match="the field of the file is empty"):
        source.content(1)
    assert source.stamp(0) is None
    with pytest.raises(ConfigError, match=r"data\.image: the field holds int64; expected paths, bytes, or both"):
        open_source(DataConfig(**settings | {"image": "kind"}))
    with pytest.raises(ConfigError, match=r"data\.image is 'photo'; .* has the fields file, kind"):
        open_source(DataConfig(**settings | {"image": "photo"}))


def saved(folder: Path, **changes: object) -> DataConfig:
    """A saved data set of a text and a class number; `changes` to its state.json."""
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}
    schema = schema.with_metadata({"huggingface": json.dumps(names)})
    with pa.ipc.new_stream(folder / "data.arrow", schema) as stream:
        stream.write_table(pa.table({"text": ["a", "b"], "label": [1, changes.pop("number", 0)]}, schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]} | changes))
    return DataConfig(source="text", path=str(folder), text="text", label="label")


def test_saved_data_sets(tmp_path: Path) -> None:
    assert open_source(saved(tmp_path)).row(0).targets == {"label": "yes"}
    with pytest.raises(DataError, match="1 records have no label"):
        open_source(saved(tmp_path, number=-1))
    with pytest.raises(DataError, match="field label has a class number beyond its 2 names"):
        open_source(saved(tmp_path, number=2))
    for name in ("../data.arrow", "/data.arrow", "..", 7):
        with pytest.raises(DataError, match=r"state\.json names .*; expected a name in the same folder"):
            open_source(saved(tmp_path, _data_files=[{"filename": name}]))
    with pytest.raises(DataError, match="cannot be read as an Arrow stream"):
        open_source(saved(tmp_path, _data_files=[{"filename": "state.json"}]))
    with pytest.raises(DataError, match="_data_files is None; expected a list"):
        open_source(saved(tmp_path, _data_files=None))
    with pytest.raises(DataError, match="holds no records"):
        open_source(saved(tmp_path, _data_files=[]))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "../test"]}')
    with pytest.raises(DataError, match=r"dataset_dict\.json names '\.\./test'"):
        open_source(DataConfig(source="text", path=str(tmp_path), text="text", label="label"))


def test_torchvision(tmp_path: Path) -> None:
    settings = {"source": "torchvision", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"data\.name is 'MNITS'; .* \(near: MNIST"):
        open_source(DataConfig(name="MNITS", **settings))
    with pytest.raises(ConfigError, match=r"data\.name is 'utils'; torchvision\.datasets has no such"):
        open_source(DataConfig(name="utils", **settings))
    with pytest.raises(DataError, match=r"MNIST, train True, cannot be opened below .*; set data\.download: true"):
        open_source(DataConfig(name="MNIST", **settings))
    with pytest.raises(DataError, match="DTD, split 'train', cannot be opened"):
        open_source(DataConfig(name="DTD", **settings))
    with pytest.raises(ConfigError, match="torchvision cannot fetch ImageFolder"):
        open_source(DataConfig(name="ImageFolder", download=True, **settings))
    with pytest.raises(ConfigError, match=r"MNIST does not take it: .*size"):
        open_source(DataConfig(name="MNIST", options={"size": 3}, **settings))
    with pytest.raises(ConfigError, match="does not take it: Unknown value 'third' for argument split"):
        open_source(DataConfig(name="DTD", options={"split": "third"}, **settings))
    source = open_source(DataConfig(name="FakeData", options={"size": 3, "image_size": [3, 4, 4]}, **settings))
    assert [np.asarray(source.content(i)).shape for i in range(3)] == [(4, 4, 3)] * 3


def test_an_image_that_vanished_is_one_bad_sample(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    source = open_source(DataConfig(source="images", path=str(tmp_path)))
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(BadSampleError, match="cannot be read: No such file"):
        source.content(0)


def not_a_source(config: DataConfig) -> str:
    return "no"


def test_own_function_must_return_a_source() -> None:
    with pytest.raises(ConfigError, match="returned str; expected a Source"):
        open_source(DataConfig(source=f"{__name__}:not_a_source"))
