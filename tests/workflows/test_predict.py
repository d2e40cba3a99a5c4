"""Reuse at inference: what runs say of inputs, from stored states and new ones alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file

from pipeline.data import open_source
from pipeline.errors import ConfigError, DataError, StaleStoreError
from pipeline.project import Project
from pipeline.runs.predictions import Predictions
from pipeline.store import Store
from pipeline.workflows import predict
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project
from stages import cli

pytestmark = pytest.mark.slow

STORED = 2e-2
"""How far the rounding of stored states may take an output, relative to the largest."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images in a folder per class, beside them new ones without classes; runs of two cuts, one of two seeds."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.write_images(folder / "photos", range(20))
    (folder / "new").mkdir()
    for seed in range(100, 130):
        (folder / f"new/{seed}.png").write_bytes(tiny.draw(seed % 3, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = Project.load(tiny.write_params(Path()))
        encode_project(loaded)
        train_project(loaded, "0.5")
        train_project(loaded.overridden({"train.seed": 1}), "0.5", "second")
        train_project(loaded, "1.0")
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of it, in the current directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Project.load(Path("params.yaml"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples the prefix ran on, at each forward pass."""
    return tiny.count_forwards(monkeypatch)


def rows_of(project: Project, inputs: str | None = None, *models: str, **options: bool) -> list[dict[str, Any]]:
    predict_project(project, models or ("0.5",), inputs, Path("out.parquet"), **options)
    return pq.read_table("out.parquet").to_pylist()


def logits(project: Project, source: list[Any], network: torch.nn.Module) -> torch.Tensor:
    """What the full model gives for contents, one by one."""
    table = predict.open_run(project, "0.5")
    samples = [table.loaded.backbone.preprocess(content) for content in source]
    return torch.cat([network(*(tensor[None] for tensor in sample.values())) for sample in samples])


def test_predictions_are_those_of_the_exported_model(project: Project, encoded: list[int]) -> None:
    rows = rows_of(project, "new")
    assert sum(encoded) == 30
    assert [row["source"] for row in rows] == [f"{seed}.png" for seed in range(100, 130)]
    export_run(project, "0.5", Path("model"))
    network = tiny.ConvNet(3).eval()
    network.load_state_dict(load_file("model/model.safetensors"))
    with torch.no_grad():
        contents = [Path("new", row["source"]).read_bytes() for row in rows]
        expected = logits(project, contents, network).softmax(-1)
    said = torch.tensor([list(row["probabilities"].values()) for row in rows])
    assert torch.allclose(said, expected, atol=STORED)
    assert list(rows[0]["probabilities"]) == list(tiny.CLASSES)
    for row in rows:
        best = max(row["probabilities"], key=row["probabilities"].__getitem__)
        assert (row["label"], row["probability"]) == (best, row["probabilities"][best])
        assert row["reason"] is None
        assert len(bytes.fromhex(row["key"])) == 16
    assert not any(Path(".recycle/predict").iterdir())


def test_known_samples_run_no_prefix(project: Project, encoded: list[int]) -> None:
    rows = rows_of(project)
    assert not encoded
    source = open_source(project.data)
    assert [row["source"] for row in rows] == [source.row(i).source for i in range(60)]
    again = rows_of(project, "photos")
    assert not encoded
    assert sorted(again, key=str) == sorted(rows, key=str)


def test_known_new_and_equal_inputs_keep_their_order(
    project: Project, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = Path("mixed")
    mixed.mkdir()
    contents = [tiny.draw(i % 3, seed) for i, seed in enumerate([3, 200, 4, 201, 200, 3, 202, 201, 5, 200])]
    contents[4] = contents[9] = contents[1]
    contents[7] = contents[3]
    for i, content in enumerate(contents):
        (mixed / f"{i}.png").write_bytes(content)
    whole = rows_of(project, "mixed")
    assert sum(encoded) == len(set(contents)) - sum(content in known_contents() for content in set(contents))
    for at_once in (1, 3, 4):
        encoded.clear()
        monkeypatch.setattr(predict, "ROWS_AT_ONCE", at_once)
        rows = rows_of(project, "mixed")
        assert [row["source"] for row in rows] == [f"{i}.png" for i in range(10)]
        assert_close(rows, whole)
        assert sum(encoded) == len(set(contents)) - sum(content in known_contents() for content in set(contents))
    assert whole[4]["probabilities"] == whole[9]["probabilities"] == whole[1]["probabilities"]


def known_contents() -> set[bytes]:
    return {path.read_bytes() for path in Path("photos").rglob("*.png")}


def assert_close(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """A batch of another size rounds differently."""
    for row, other in zip(rows, others, strict=True):
        assert (row["source"], row["key"]) == (other["source"], other["key"])
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_at_most_a_segment_of_new_states_waits(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    encode = predict.SharedStates.encode

    def counted(self: predict.SharedStates, rows: np.ndarray) -> None:
        encode(self, rows)
        held.append(len(self.fresh.keys()))

    monkeypatch.setattr(predict.SharedStates, "encode", counted)
    rows_of(project, "new")
    assert held == [20, 10]


def test_written_states_are_those_of_an_encode(project: Project, encoded: list[int], tmp_path: Path) -> None:
    fresh = rows_of(project, "new")
    before = tiny.files(Path("data/activations/0.5"))
    written = rows_of(project, "new", write=True)
    assert sum(encoded) == 60
    assert_close(written, fresh)
    assert rows_of(project, "new", write=True) == written == rows_of(project, "new")
    assert sum(encoded) == 60
    grown = tiny.files(Path("data/activations/0.5"))
    assert before.items() < grown.items()
    other = tmp_path / "other"
    shutil.copytree("new", other / "photos/circle")
    shutil.copytree("new", other / "photos/square")
    (other / "params.yaml").write_text(Path("params.yaml").read_text().replace("validation: 0.25", "validation: 0.0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(other)
        encode_project(Project.load(Path("params.yaml")))
    shared = ("recipe.json", "probe/")  # of the store, whatever its samples
    assert tiny.files(other / "data/activations/0.5") == {
        name: content for name, content in grown.items() if name.startswith(shared) or name not in before
    }


def test_runs_on_one_store_share_its_prefix(project: Project, encoded: list[int]) -> None:
    both = rows_of(project, "new", "0.5", "second", "0.5")
    assert sum(encoded) == 30
    assert list(both[0])[:4] == ["source", "key", "reason", "0.5/label"]
    for name in ("0.5", "second"):
        alone = rows_of(project, "new", name)
        assert [row["probabilities"] for row in alone] == [row[f"{name}/probabilities"] for row in both]
    assert both[0]["0.5/probabilities"] != both[0]["second/probabilities"]
    encoded.clear()
    rows_of(project, "new", "0.5", "1.0", "second")
    assert sum(encoded) == 60


def test_rows_keep_their_predictions_whatever_their_lengths() -> None:
    predictions = Predictions({"embedding": [float], "score": float})

    def add(rows: list[int], width: int) -> None:
        values = np.asarray(rows, np.float32)
        predictions.add(np.asarray(rows), {"embedding": np.tile(values[:, None], width), "score": values})

    add([3, 1], 2)
    add([2], 2)
    assert predictions.take(np.array([1, 0, 3])).to_pylist() == [
        {"embedding": [1, 1], "score": 1},
        {"embedding": None, "score": None},
        {"embedding": [3, 3], "score": 3},
    ]
    predictions.keep(np.array([0, 3]))
    add([5], 1)
    add([4], 3)
    taken = predictions.take(np.array([4, 3, 2, 5]))
    assert taken.schema == predictions.schema
    assert taken.column("embedding").to_pylist() == [[4, 4, 4], [3, 3], None, [5]]


def test_json_lines_say_the_same(project: Project) -> None:
    rows = rows_of(project, "new")
    predict_project(project, ["0.5"], "new", Path("deep/out.jsonl"))
    assert [json.loads(line) for line in Path("deep/out.jsonl").read_text().splitlines()] == rows


def test_bad_inputs_have_rows_that_say_why(project: Project) -> None:
    Path("new/105.png").write_bytes(b"broken")
    Path("new/106.png").write_bytes(b"broken")
    Path("new/107.png").unlink()
    Path("new/107.png").symlink_to("nowhere")
    Path("new/120.png").write_bytes(tiny.draw(0, 0))
    for options in ({}, {"write": True}):
        assert not predict_project(project, ["0.5", "1.0"], "new", Path("out.parquet"), **options)
        rows = {row["source"]: row for row in pq.read_table("out.parquet").to_pylist()}
        assert len(rows) == 30
        for name in ("105.png", "106.png", "107.png"):
            assert rows[name]["reason"]
            assert rows[name]["0.5/label"] is rows[name]["1.0/probabilities"] is None
        assert rows["107.png"]["key"] is None
        assert rows["105.png"]["key"] == rows["106.png"]["key"]
        assert sum(row["reason"] is None and row["0.5/label"] is not None for row in rows.values()) == 27
    tolerant = Project.load(tiny.write_params(Path(), encode={"max_bad": 3}))
    assert predict_project(tolerant, ["0.5"], "new", Path("out.parquet"))


def test_exit_code_and_default_input(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", "--model", "0.5", "--output", "own.jsonl"])
    assert ended.value.code == 0
    assert len(Path("own.jsonl").read_text().splitlines()) == 60
    Path("new/105.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", "--model", "0.5", "--input", "new", "--output", "new.jsonl"])
    assert ended.value.code == 3


def test_what_is_wrong_is_said(project: Project) -> None:
    out = Path("out.parquet")
    with pytest.raises(DataError, match=r"run third: .* does not exist; .* finished runs: 0\.5, 1\.0, second"):
        predict_project(project, ["third"], None, out)
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.parquet or \.jsonl"):
        predict_project(project, ["0.5"], None, Path("out.csv"))
    with pytest.raises(ConfigError, match="nothing is there"):
        predict_project(project, ["0.5"], "nowhere", out)
    Path("empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        predict_project(project, ["0.5"], "empty", out)
    other = Project.load(tiny.write_params(Path(), preprocess={"image_size": 20}))
    with pytest.raises(StaleStoreError, match="image_size"):
        predict_project(other, ["0.5"], None, out)
    assert not out.exists()


def test_classes_are_called_as_in_training(project: Project) -> None:
    before = rows_of(project, "new")
    shutil.copytree("photos/circle", "photos/round")
    shutil.rmtree("photos/circle")
    encode_project(project)
    assert rows_of(project, "new") == before
    shutil.copytree("new", "photos/another")
    encode_project(project)
    with pytest.raises(DataError, match=r"does not fit today's settings and labels; train it again .*size mismatch"):
        rows_of(project, "new")


def test_weights_must_fit(project: Project) -> None:
    shutil.copy("results/runs/1.0/model.safetensors", "results/runs/0.5/model.safetensors")
    with pytest.raises(DataError, match=r"run 0\.5: .* does not fit today's settings and labels; .*Missing key"):
        rows_of(project)


def test_views_are_left_aside(tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(6))
    augment = {"preprocess": {"augment": [{"RandomHorizontalFlip": {"p": 1.0}}]}, "encode": {"views": 1, "cuts": [0.5]}}
    loaded = Project.load(tiny.write_params(tmp_path, **augment))
    encode_project(loaded)
    train_project(loaded, "0.5")
    held_out = len(Store.open(loaded.store_path(0.5)).keys())
    encoded.clear()
    rows = rows_of(loaded)
    assert sum(encoded) == 18 - held_out
    assert all(row["label"] for row in rows)


TEXTS = ("good one two", "bad bad three", "two", "good good one one one", "three bad one two")


@pytest.fixture
def texts(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(0).choice(["one", "two", "three", "good", "bad"], (40, 11))
    lines = [{"text": " ".join(row[: 1 + i % 11]), "label": i % 2} for i, row in enumerate(words.tolist())]
    Path("texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"q": a["text"], "a": f"{a['text']} one"}) + "\n" for a in lines[:20])
    )
    Path("new.jsonl").write_text(
        "".join(json.dumps({"text": text, "q": text}) + "\n" for text in [*TEXTS, "", TEXTS[0]])
    )
    return tmp_path


def text_project(folder: Path, data: dict[str, Any], **sections: dict[str, Any]) -> Project:
    common = {
        "model": {"backbone": f"hf:{folder / 'bert'}"},
        "preprocess": {"kind": "text", "image_size": None},
        "encode": {"cuts": [0.5], "batch_size": 4},
    }
    loaded = Project.load(tiny.write_params(folder, **{"data": data, **common, **sections}))
    encode_project(loaded)
    train_project(loaded, "0.5")
    return loaded


def known(file: str, field: str) -> set[str]:
    return {json.loads(line)[field] for line in Path(file).read_text().splitlines()}


def test_texts_of_every_length(texts: Path, encoded: list[int]) -> None:
    data = {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"}
    project = text_project(texts, data)
    encoded.clear()
    rows = rows_of(project, "new.jsonl")
    assert sum(encoded) == len(set(TEXTS) - known("texts.jsonl", "text"))
    assert [row["source"] for row in rows] == [f"new.jsonl#{i}" for i in range(7)]
    assert "no text" in rows[5]["reason"]
    assert rows[5]["label"] is None
    assert rows[6]["probabilities"] == rows[0]["probabilities"]
    assert {row["label"] for row in rows if row["reason"] is None} <= {0, 1}
    network = predict.open_run(project, "0.5")
    export_run(project, "0.5", Path("model"))
    full = network.loaded.backbone.model.eval()
    full.load_state_dict(load_file("model/model.safetensors"))
    with torch.no_grad():
        for text, row in zip(TEXTS, rows, strict=False):
            sample = {name: tensor[None] for name, tensor in network.loaded.backbone.preprocess(text).items()}
            expected = full(**sample).logits[0].softmax(-1).tolist()
            assert list(row["probabilities"].values()) == pytest.approx(expected, abs=STORED)


def test_one_half_of_pairs_is_embedded(texts: Path, encoded: list[int]) -> None:
    data = {"source": "pairs", "path": "pairs.jsonl", "anchor": "q", "positive": "a"}
    project = text_project(texts, data, task={"kind": "similarity"}, train={"batch_size": 8, "epochs": 1})
    encoded.clear()
    own = rows_of(project)
    assert not encoded
    assert len(own) == 40
    rows = rows_of(project, "new.jsonl")
    assert [len(row["embedding"]) for row in rows if row["reason"] is None] == [8] * 6
    assert sum(encoded) == len(set(TEXTS) - known("pairs.jsonl", "q"))
