"""The stages on texts: states of every length, stored without padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from pipeline.data import SampleTable, open_source
from pipeline.encode.ragged import pad_batch
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.store import Reader
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seventy texts of one to eleven words and thirty pairs of them, in the current directory."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)

    def text() -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, 12)))

    texts = sorted({text() for _ in range(200)})[:70]
    lines = [{"text": t, "label": "good" if t.count("good") > t.count("bad") else "other"} for t in texts]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"q": a, "a": b} for a, b in zip(texts[:30], texts[30:60], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    return tmp_path


def project(folder: Path, backbone: str | None = None, **changes: dict[str, object]) -> Project:
    bert = f"hf:{folder / 'bert'}"
    given: dict[str, dict[str, object]] = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": backbone or bert},
        "preprocess": {"kind": "text", "image_size": None} | ({"tokenizer": str(folder / "bert")} if backbone else {}),
        "encode": {"cuts": [0, 0.5, 1.0]},
    }
    names = given.keys() | changes.keys()
    return Project.load(tiny.write_params(folder, **{n: given.get(n, {}) | changes.get(n, {}) for n in names}))


def pairs(folder: Path, **task: object) -> Project:
    data = {"source": "pairs", "path": "pairs.jsonl", "anchor": "q", "positive": "a", "text": None, "label": None}
    return project(folder, data=data, task={"kind": "similarity", **task}, train={"batch_size": 8})


def assert_stored_as_alone(project: Project, cut: float) -> None:
    """What the store holds of every sample is what the prefix gives for it alone, to float16's rounding."""
    table = SampleTable.read(project.samples)
    loaded = LoadedModel.open(project, table)
    store, prefix, _ = loaded.open_store(cut, table)
    source, reader = open_source(project.data), Reader(store.path)
    lengths = set()
    for i in range(len(source)):
        sample = loaded.backbone.preprocess(source.content(i))
        alone = prefix(**pad_batch([sample, sample], loaded.backbone.preprocess.pad))
        stored = reader.gather(store.first_places(np.array([i])))
        assert stored["input.input_ids"].tolist() == [sample["input_ids"].tolist()]
        for name, tensor in alone.items():
            kept = stored[f"state.{name}"].float()[0]
            assert kept.shape == tensor.shape[1:]
            assert torch.allclose(kept, tensor[0], rtol=2e-3, atol=2e-3)
        lengths.add(len(sample["input_ids"]))
    assert len(lengths) > 5


def test_states_are_those_of_each_text_alone(folder: Path) -> None:
    assert encode_project(project(folder))
    assert_stored_as_alone(project(folder), 0.5)


def test_shortest_and_longest_may_have_the_same_number_of_tokens(folder: Path) -> None:
    texts = ["x y", "x z", *(" ".join(["good"] * n) for n in range(1, 12)), f"{'x' * 80} y", f"{'x' * 80} z"]
    lines = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode_project(project(folder))
    assert_stored_as_alone(project(folder), 0.5)


@pytest.mark.filterwarnings("ignore:.*depends on how far it is padded")
def test_where_padding_leaks_none_is_used(folder: Path) -> None:
    settings = project(folder, backbone="tiny:leaky")
    assert encode_project(settings)
    assert_stored_as_alone(settings, 0.5)


@pytest.mark.filterwarnings("ignore:.*depends on how far it is padded")
def test_a_cuts_bytes_do_not_depend_on_its_company(folder: Path) -> None:
    encode_project(project(folder, backbone="tiny:leaky"))
    together = tiny.files(folder / "data/activations/0.5")
    (folder / "data").rename(folder / "before")
    encode_project(project(folder, backbone="tiny:leaky", encode={"cuts": [0.5]}))
    assert tiny.files(folder / "data/activations/0.5") == together


def test_training_and_export_of_a_classifier(folder: Path) -> None:
    encode_project(project(folder))
    run = train_project(project(folder), "0.5")
    assert run.recycled == 0.5
    assert {"validation/accuracy", "validation/macro_f1"} < run.history[0].keys()
    parity = export_run(project(folder), "0.5", folder / "model")
    assert parity.merged < 1e-5
    exported = Project.load(tiny.write_params(folder, model={"backbone": f"hf:{folder / 'model'}"})).model
    assert (folder / "model/tokenizer.json").exists()
    assert exported.library == "hf"


def test_pairs_train_and_are_scored_by_retrieval(folder: Path) -> None:
    encode_project(pairs(folder))
    run = train_project(pairs(folder), "0.5")
    assert run.metric == "precision_at_1"
    assert 0 <= run.value <= 1
    assert export_run(pairs(folder), "0.5", folder / "model").merged < 1e-5


def test_without_a_head_the_last_block_is_what_trains(folder: Path) -> None:
    encode_project(pairs(folder))
    assert train_project(pairs(folder), "1.0").recycled == 0.5


def test_a_head_of_its_own_trains_above_all_blocks(folder: Path) -> None:
    encode_project(pairs(folder, layers=[4]))
    assert len(train_project(pairs(folder, layers=[4]), "1.0").history) == 2


def test_a_network_in_another_folder_is_the_same_network(folder: Path) -> None:
    encode_project(project(folder))
    (folder / "bert").rename(folder / "moved")
    assert train_project(project(folder, model={"backbone": f"hf:{folder / 'moved'}"}), "0.5").recycled == 0.5


def test_an_empty_text_is_set_aside(folder: Path) -> None:
    with (folder / "texts.jsonl").open("a") as file:
        file.write(json.dumps({"text": "  ", "label": "other"}) + "\n")
    assert not encode_project(project(folder))
    assert "' '; expected a text" in (folder / "data/quarantine.csv").read_text()
