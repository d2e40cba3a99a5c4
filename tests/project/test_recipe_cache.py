"""An encode that has nothing to do builds no model, and leaves what it would have left had it built one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from pipeline.data import SampleTable, build, open_source
from pipeline.data.media import ImageFolder
from pipeline.encode.keying import key_contents
from pipeline.project import Project, recipe_cache
from pipeline.project.model import LoadedModel
from pipeline.store import Store
from pipeline.workflows.encode import encode_project
from stages import cli

pytestmark = pytest.mark.slow

TEXTS = ["one", "two three", "good good good", "bad", "one two", "three bad", "good one", "two two two two"]


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight texts and a tiny BERT whose files are old, in the current directory."""
    monkeypatch.chdir(tmp_path)
    label(tmp_path, ["a", "b"] * 4)
    for file in text_folder.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return tmp_path


def label(folder: Path, labels: list[str], texts: list[str] | None = None) -> None:
    lines = [{"text": text, "label": label} for text, label in zip(texts or TEXTS, labels, strict=True)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def project(folder: Path, **changes: dict[str, object]) -> Project:
    given: dict[str, dict[str, object]] = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": "hf:bert"},
        "preprocess": {"kind": "text", "image_size": None},
        "encode": {"cuts": [0.5, 1.0], "segment_samples": 5},
    }
    names = given.keys() | changes.keys()
    return Project.load(tiny.write_params(folder, **{n: given.get(n, {}) | changes.get(n, {}) for n in names}))


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything an encode leaves outside of its own notes."""
    left = [tiny.files(folder / "data"), tiny.files(folder / "results")]
    return {f"{number}/{name}": content for number, some in enumerate(left) for name, content in some.items()}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Project]:
    """The projects whose model was built."""
    opened: list[Project] = []
    build = LoadedModel.open

    def told(project: Project, table: SampleTable, **how: Any) -> LoadedModel:
        opened.append(project)
        return build(project, table, **how)

    monkeypatch.setattr(LoadedModel, "open", told)
    return opened


def test_with_nothing_to_do_no_model_is_built_and_all_comes_out_the_same(
    folder: Path, built: list[Project], caplog: pytest.LogCaptureFixture
) -> None:
    encode_project(project(folder))
    first = outputs(folder)
    caplog.set_level("INFO", logger="recycle")
    caplog.clear()
    assert encode_project(project(folder))
    assert len(built) == 1
    quick, said = outputs(folder), caplog.messages
    caplog.clear()
    shutil.rmtree(folder / ".recycle")
    assert encode_project(project(folder))
    assert len(built) == 2
    assert first == quick == outputs(folder)
    assert said == [line for line in caplog.messages if not line.startswith("hf:bert")]


def test_what_changed_besides_the_contents_comes_out_the_same(folder: Path, built: list[Project]) -> None:
    encode_project(project(folder))
    (folder / "data/samples.parquet").unlink()
    (folder / "data/quarantine.csv").unlink()
    label(folder, ["b", "a"] * 4)
    encode_project(project(folder))
    encode_project(project(folder))
    quick = outputs(folder)
    assert len(built) == 2, "new labels are proved once"
    assert SampleTable.read(folder / "data/samples.parquet").targets["label"].tolist() == ["b", "a"] * 4
    shutil.rmtree(folder / ".recycle")
    encode_project(project(folder))
    assert quick == outputs(folder)


def test_rehash_builds(folder: Path, built: list[Project]) -> None:
    encode_project(project(folder))
    encode_project(project(folder), rehash=True)
    assert len(built) == 2


def test_a_text_that_cannot_be_keyed_is_set_aside_either_way(folder: Path, built: list[Project]) -> None:
    label(folder, ["a", "b"] * 4 + ["a"], [*TEXTS, " "])
    assert not encode_project(project(folder))
    first = outputs(folder)
    assert not encode_project(project(folder))
    assert outputs(folder) == first
    assert len(built) == 1


@pytest.mark.parametrize("lost", ["segment", "store", "recipe", "notes", "torn notes", "other notes"])
def test_what_is_no_longer_there_is_made_again(folder: Path, built: list[Project], lost: str) -> None:
    encode_project(project(folder))
    before = outputs(folder)
    store = folder / "data/activations/0.5"
    if lost == "segment":
        shutil.rmtree(store / Store.open(store).segments()[0])
    elif lost == "store":
        shutil.rmtree(store)
    elif lost == "recipe":
        other = json.loads((store / "recipe.json").read_text()) | {"weights": "of another network"}
        (store / "recipe.json").write_text(json.dumps(other))
    elif lost == "notes":
        (folder / ".recycle" / recipe_cache.FILE).unlink()
    else:
        text = '{"key": ' if lost == "torn notes" else '["key"]'
        (folder / ".recycle" / recipe_cache.FILE).write_text(text)
    encode_project(project(folder), replace_stores=lost == "recipe")
    assert len(built) == 2
    kept = {name: content for name, content in outputs(folder).items() if not name.endswith("encode.json")}
    assert kept == {name: content for name, content in before.items() if not name.endswith("encode.json")}
    encode_project(project(folder))
    assert len(built) == 2


def touch(name: str) -> Callable[[Path], object]:
    return lambda folder: os.utime(folder / "bert" / name, (1_600_000_001, 1_600_000_001))


@pytest.mark.parametrize(
    "change",
    [
        touch("model.safetensors"),
        touch("config.json"),
        touch("tokenizer.json"),
        lambda folder: shutil.copy2(folder / "bert/config.json", folder / "bert/more.json"),
        lambda folder: label(folder, ["a"] * 8),
        lambda folder: label(folder, ["a", "b"] * 4, [*TEXTS[:-1], "another"]),
    ],
    ids=["weights", "config", "tokenizer", "a further file", "label", "text"],
)
def test_files_that_decide_a_recipe_are_watched(folder: Path, change: Callable[[Path], object]) -> None:
    encode_project(project(folder))
    keys = SampleTable.read(folder / "data/samples.parquet").keys
    assert recipe_cache.complete_stores(project(folder), cache_key(project(folder)), [keys])
    change(folder)
    assert recipe_cache.complete_stores(project(folder), cache_key(project(folder)), [keys]) is None


def cache_key(given: Project) -> str | None:
    source = open_source(given.data)
    keyed = key_contents(source, workers=1)
    return recipe_cache.cache_key(given, build(source, keyed.keys, given.data))


CHANGES: list[dict[str, dict[str, Any]]] = [
    {"encode": {"precision": "bfloat16"}},
    {"encode": {"dtype": "float32"}},
    {"preprocess": {"max_length": 8}},
    {"model": {"seed": 1}},
    {"model": {"options": {"hidden_dropout_prob": 0.0}}},
    {"model": {"weights": None}},
    {"data": {"validation": 0.5}},
    {"task": {"label_smoothing": 0.1}},
    {"encode": {"cuts": [0.5]}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_settings_that_may_decide_a_recipe_are_in_the_digest(folder: Path, change: dict[str, dict[str, Any]]) -> None:
    known = cache_key(project(folder))
    assert known is not None
    assert cache_key(project(folder, **change)) not in (None, known)


def test_settings_that_decide_none_are_not(folder: Path) -> None:
    known = cache_key(project(folder))
    free: dict[str, dict[str, Any]] = {
        "encode": {"batch_size": 3, "segment_samples": 7, "workers": 2, "device": "cpu", "max_bad": 5},
        "train": {"lr": 0.5, "epochs": 9},
    }
    assert cache_key(project(folder, **free)) == known


def test_libraries_and_the_package_itself_are_in_the_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = cache_key(project(folder))
    with monkeypatch.context() as patch:
        patch.setattr(recipe_cache, "version", lambda name: "99" if name == "torch" else "1")
        assert cache_key(project(folder)) != known
    package = folder / "copy"
    shutil.copytree(Path(recipe_cache.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recipe_cache, "__file__", str(package / "project/recipe_cache.py"))
    assert cache_key(project(folder)) == known
    with (package / "split/cut.py").open("a") as file:
        file.write("# changed\n")
    assert cache_key(project(folder)) != known


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"backbone": "tiny:conv_net"}},
        {"model": {"backbone": "hf:hub/name"}},
        {"model": {"backbone": "timm:resnet18"}},
        {"model": {"trust_remote_code": True}},
        {"preprocess": {"tokenizer": "hub/name"}},
        {"task": {"kind": "tiny:task"}},
    ],
    ids=str,
)
def test_what_cannot_be_known_without_building_is_not_vouched_for(
    folder: Path, change: dict[str, dict[str, Any]]
) -> None:
    assert cache_key(project(folder)) is not None
    assert cache_key(project(folder, **change)) is None


def test_weights_that_may_still_change_unseen_are_not_vouched_for(folder: Path) -> None:
    os.utime(folder / "bert/model.safetensors")
    assert cache_key(project(folder)) is None


def test_weights_that_change_meanwhile_are_not_vouched_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, built: list[Project]
) -> None:
    build = LoadedModel.open

    def overtaken(project: Project, table: SampleTable, **how: Any) -> LoadedModel:
        touch("model.safetensors")(folder)
        return build(project, table, **how)

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "open", overtaken)
        encode_project(project(folder))
    os.utime(folder / "bert/model.safetensors", (1_600_000_000, 1_600_000_000))
    encode_project(project(folder))
    assert len(built) == 2


def test_a_second_run_over_images_reads_none_of_them_unless_told_to(
    folder: Path, built: list[Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_images(folder / "photos", range(4))
    for file in (folder / "photos").rglob("*.png"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    network: dict[str, object] = {"backbone": "torchvision:squeezenet1_1", "weights": None}
    tiny.write_params(folder, model=network, preprocess={"image_size": 32}, encode={"cuts": [0.5]})
    assert CliRunner().invoke(cli.recycle, ["encode"]).exit_code == 0
    reads: list[int] = []
    content = ImageFolder.content

    def told(source: ImageFolder, i: int) -> bytes:
        reads.append(i)
        return content(source, i)

    monkeypatch.setattr(ImageFolder, "content", told)
    assert CliRunner().invoke(cli.recycle, ["encode"]).exit_code == 0
    assert (reads, len(built)) == ([], 1)
    assert CliRunner().invoke(cli.recycle, ["encode", "--rehash"]).exit_code == 0
    assert (set(reads), len(built)) == (set(range(12)), 2)


def test_half_a_pair_counts_too(folder: Path, built: list[Project]) -> None:
    halves = [{"q": one, "a": other} for one, other in [("one", "two"), ("good", "bad"), ("three", " ")]]
    data: dict[str, object] = {"source": "pairs", "path": "pairs.jsonl", "anchor": "q", "positive": "a"}
    given = {"data": data | {"text": None, "label": None}, "task": {"kind": "similarity"}}

    def write() -> None:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(half) + "\n" for half in halves))

    write()
    encode_project(project(folder, **given))
    halves[2] = {"q": " ", "a": "two two"}
    write()
    encode_project(project(folder, **given))
    assert len(built) == 2, "the table is the same, and yet a half is missing in the stores"


def test_nothing_known_vouches_for_nothing(folder: Path) -> None:
    assert recipe_cache.complete_stores(project(folder), None, [np.zeros((0, 16), np.uint8)]) is None
