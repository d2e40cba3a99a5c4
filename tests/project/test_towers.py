"""An encoder for each role of a pair: its samples, its store, its cut; trained together."""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import pipeline.project.loaders
import pipeline.train.fit
from pipeline.data import Content, DataConfig, Row, SampleTable, Source
from pipeline.errors import ConfigError, DataError, StaleStoreError, StoreError, TrainError
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
from pipeline.project.stores import stores_of, unnamed_stores
from pipeline.project.towers import Towers, new_parameters, open_tower, trainable_model
from pipeline.store import Store
from pipeline.tasks import Head
from pipeline.tasks.layers import build_head
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project
from stages.cli import recycle

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")
CPU = torch.device("cpu")
ANCHOR = "data/activations/0.5/anchor"
FROZEN: dict[str, Any] = {"positive": {"cut": 1.0, "trains": False}}


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pairs of texts of which one has the words of the other backwards, and a second, wider BERT."""
    monkeypatch.chdir(tmp_path)
    texts = [text for size in (1, 2, 3) for text in itertools.combinations_with_replacement(WORDS, size)]
    lines = [{"q": " ".join(text), "a": " ".join([*text[::-1], "bad"])} for text in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(text_folder, tmp_path / "wide")
    torch.manual_seed(2)
    config = BertConfig.from_pretrained(text_folder, hidden_size=12, num_hidden_layers=4, num_attention_heads=3)
    BertModel(config).save_pretrained(tmp_path / "wide")
    return tmp_path


def project(folder: Path, towers: Mapping[str, object] | None = None, **changes: dict[str, Any]) -> Project:
    """A project on the pairs; `towers` is that section."""
    data = {"source": "pairs", "path": "pairs.jsonl", "validation": 0.3, "anchor": "q", "positive": "a"}
    path = tiny.write_params(
        folder,
        data=data | changes.pop("data", {}),
        model={"backbone": f"hf:{folder / 'bert'}"} | changes.pop("model", {}),
        preprocess={"kind": "text", "image_size": None} | changes.pop("preprocess", {}),
        task={"kind": "similarity"} | changes.pop("task", {}),
        encode={"cuts": [0.5]} | changes.pop("encode", {}),
        train={"epochs": 2, "batch_size": 16} | changes.pop("train", {}),
    )
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | {"towers": dict(towers or {})}))
    return Project.load(path)


def wide(**tower: object) -> dict[str, Any]:
    return {"model": {"backbone": "hf:wide"}, **tower}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples a prefix ran on while encoding, at each forward pass."""
    return tiny.count_forwards(monkeypatch)


class Drawings(Source):
    """Names of shapes as anchors, and drawings of them as positives; one file is broken."""

    def __init__(self, config: DataConfig) -> None:
        self.broken = config.options["broken"]

    def __len__(self) -> int:
        return 72

    def row(self, i: int) -> Row:
        return Row(f"pair {i // 2}", None, {"pair": i // 2, "role": ("anchor", "positive")[i % 2]})

    def content(self, i: int) -> Content:
        label, seed = divmod(i // 2, 12)
        if i % 2 == 0:
            return f"{WORDS[label]} {WORDS[seed % 5]} {WORDS[seed // 5]}"
        return b"no image" if i == self.broken else tiny.draw(label, seed)


class Picture(tiny.ConvNet):
    """Embeds images in 8 numbers."""


def picture(head: Head) -> nn.Module:
    return Picture(8)


def of_words(text: Content) -> list[str]:
    """The same for texts that differ in the order of their words."""
    assert isinstance(text, str)
    return sorted(text.split())


def weights() -> dict[str, torch.Tensor]:
    return load_file("results/runs/0.5/model.safetensors")


def test_a_frozen_tower_is_run_once_and_the_other_learns_towards_it(folder: Path, forwards: list[int]) -> None:
    towers = {"anchor": wide(layers=[8]), "positive": {"cut": 1.0, "trains": False}}
    settings = project(folder, towers, train={"epochs": 20, "lr": 0.005})
    encode_project(settings)
    assert sum(forwards) == 55 + 55
    assert [path.as_posix() for path in stores_of(settings)] == [ANCHOR, "data/activations/1.0/positive"]
    run = train_project(settings, "0.5")
    assert sum(forwards) == 55 + 55
    assert run.recycled == 0.5
    assert run.train_samples == len(SampleTable.read(settings.samples).rows("train"))
    assert run.value > run.initial + 0.4


def test_a_frozen_tower_has_no_gradient_and_keeps_its_weights(folder: Path) -> None:
    settings = project(folder, {"positive": {"trains": False}})
    encode_project(settings)
    table = SampleTable.read(settings.samples)
    towers = [open_tower(part, 0.5, table) for part in settings.parts]
    pretrained = {
        f"{tower.name}.{name}": one.clone() for tower in towers for name, one in tower.suffix.named_parameters()
    }
    model, (training, *_) = trainable_model(towers), open_loaders(towers, table, CPU)
    model.train()
    batch = next(iter(training))
    assert isinstance(model, Towers)
    embeddings = model(batch.state, **batch.inputs)
    embeddings.sum().backward()
    graded = {name for name, one in model.named_parameters() if one.grad is not None}
    assert graded
    assert all(name.startswith("anchor.") for name in graded)
    assert model["anchor"].training
    assert not model["positive"].training
    train_project(settings, "0.5")
    kept = weights()
    changed = {name for name, one in pretrained.items() if not torch.equal(kept[name], one)}
    assert changed == graded


def test_a_batch_has_the_states_and_targets_of_its_rows(folder: Path) -> None:
    window = {"shuffle": "window", "group_by_length": True, "batch_size": 7}
    settings = project(folder, {"positive": wide(cut=0.75)}, encode={"segment_samples": 16}, train=window)
    encode_project(settings)
    table = SampleTable.read(settings.samples)
    towers = {str(part.tower): open_tower(part, 0.5, table) for part in settings.parts}
    training, validation, _ = open_loaders(list(towers.values()), table, CPU, memory=40_000)
    prepared = towers["anchor"].loaded.task.prepare(table)
    for loader, split in ((training, "train"), (validation, "validation")):
        epochs = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == len(loader)
            epochs.append(torch.cat([batch.rows for batch in batches]).tolist())
            for batch in batches:
                rows = batch.rows.numpy()
                pairs = table.targets["pair"][rows].reshape(2, -1)
                assert set(pairs[0]) == set(pairs[1])
                assert batch.targets["group"].tolist() == prepared["group"][rows].tolist()
                assert batch.targets["role"].tolist() == [0] * len(pairs[0]) + [1] * len(pairs[0])
                for (name, tower), own in zip(towers.items(), rows.reshape(2, -1), strict=True):
                    alone = tower.loaded.stored_batch(tower.store, np.searchsorted(tower.rows, own))
                    (state,) = alone.state
                    assert torch.equal(batch.state[f"{name}.{state}"], alone.state[state])
                    assert torch.equal(batch.inputs[f"{name}.input_ids"], alone.inputs["input_ids"])
        assert sorted(epochs[0]) == sorted(epochs[1]) == table.rows(split).tolist()
        assert (epochs[0] == epochs[1]) == (split == "validation")


def test_towers_that_share_keep_one_set_of_weights(folder: Path) -> None:
    longer = {"preprocess": {"kind": "text", "max_length": 5}}
    settings = project(folder, {"shared": True, "anchor": longer})
    encode_project(settings)
    table = SampleTable.read(settings.samples)
    model = trainable_model([open_tower(part, 0.5, table) for part in settings.parts])
    assert model["anchor"] is model["positive"]
    train_project(settings, "0.5")
    kept = weights()
    own = {name.removeprefix("anchor.") for name in kept if name.startswith("anchor.")}
    assert {f"{role}.{name}" for role in ("anchor", "positive") for name in own} == kept.keys()
    assert all(torch.equal(kept[f"anchor.{name}"], kept[f"positive.{name}"]) for name in own)
    parted = project(folder, {"anchor": longer})
    encode_project(parted)
    train_project(parted, "0.5")
    kept = weights()
    assert not all(torch.equal(kept[f"anchor.{name}"], kept[f"positive.{name}"]) for name in own)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("towers", [{"positive": {"trains": False}}, {"shared": True, "positive": {}}], ids=str)
def test_a_killed_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, towers: dict[str, Any]) -> None:
    settings = project(folder, towers, train={"epochs": 3, "adapter": "lora"})
    encode_project(settings)
    train_project(settings, "0.5")
    expected, save = weights(), pipeline.train.fit.save

    def dying(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(pipeline.train.fit, "save", dying)
    with pytest.raises(Killed):
        train_project(settings, "0.5")
    monkeypatch.setattr(pipeline.train.fit, "save", save)
    assert len(train_project(settings, "0.5").history) == 3
    assert not any("lora" in name for name in expected)
    assert all(torch.equal(one, expected[name]) for name, one in weights().items())


def test_from_pairs_to_reports_models_and_predictions(folder: Path) -> None:
    settings = project(folder, {"anchor": wide(layers=[8]), "positive": {"cut": 1.0, "trains": False}})
    encode_project(settings)
    train_project(settings, "0.5")
    costs = json.loads(Path("results/encode.json").read_text())["cuts"]
    assert {name: cost["samples"] for name, cost in costs.items()} == {"0.5/anchor": 55, "1.0/positive": 55}
    assert "it has 55 of 55 samples" in CliRunner().invoke(recycle, ["store", "info", ANCHOR]).output
    (row,) = report_project(settings)
    nbytes = [cost["state_bytes_per_sample"] for cost in costs.values()]
    assert row.state_bytes_per_sample == round(sum(nbytes) / 2)
    assert row.encode_seconds == pytest.approx(sum(cost["encode_seconds"] for cost in costs.values()))
    assert export_run(settings, "0.5", folder / "model").samples == 64
    assert json.loads((folder / "model/anchor/backbone.json").read_text())["layers"] == [8]
    assert json.loads((folder / "model/positive/parity.json").read_text())["samples"] == 32
    with pytest.raises(ConfigError, match=r"the towers are anchor, positive; choose one with --tower"):
        predict_project(settings, ["0.5"], None, Path("out.jsonl"))
    (folder / "new.jsonl").write_text('{"q": "good good one"}\n{"q": "one two"}\n')
    predict_project(settings, ["0.5"], "new.jsonl", Path("out.jsonl"), tower="anchor")
    said = [json.loads(line)["embedding"] for line in Path("out.jsonl").read_text().splitlines()]
    assert torch.allclose(
        torch.tensor(said), embedded(folder / "model/anchor", ["good good one", "one two"]), atol=1e-2
    )
    with pytest.raises(DataError, match="no sample of the data has the role 'positive'"):
        predict_project(settings, ["0.5"], "new.jsonl", Path("out.jsonl"), tower="positive")
    predict_project(settings, ["0.5"], None, Path("out.jsonl"), tower="positive")
    assert len(Path("out.jsonl").read_text().splitlines()) == 55


def embedded(model: Path, texts: list[str]) -> torch.Tensor:
    """What an exported tower gives: features, their mean, and its head."""
    network, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    described = json.loads((model / "backbone.json").read_text())
    head = build_head(described["layers"], described["features"])
    head.load_state_dict(load_file(model / "projection.safetensors"))
    with torch.no_grad():
        features = [network(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in texts]
        return head(torch.cat(features))


def test_what_does_not_change_is_not_encoded_again(folder: Path, forwards: list[int]) -> None:
    encode_project(project(folder, FROZEN))
    before = tiny.files(Path("data/activations"))
    encode_project(project(folder, FROZEN))
    assert sum(forwards) == 110
    encode_project(project(folder, FROZEN, encode={"cuts": [0.5, 0]}))
    assert sum(forwards) == 110 + 55
    assert before.items() < tiny.files(Path("data/activations")).items()
    encode_project(project(folder, {**FROZEN, "anchor": wide()}), replace_stores=True)
    assert sum(forwards) == 110 + 55 + 55
    assert not unnamed_stores(project(folder, FROZEN, encode={"cuts": [0.5, 0]}))
    assert [path.as_posix() for path in unnamed_stores(project(folder))] == [
        "data/activations/0/anchor",
        ANCHOR,
        "data/activations/1.0/positive",
    ]


def test_a_store_of_one_tower_is_never_read_as_the_others(folder: Path) -> None:
    encode_project(project(folder, FROZEN))
    with pytest.raises(ConfigError, match=r"cut 0\.5: there is no store at data/activations/0\.5/positive"):
        train_project(project(folder, {"anchor": {}}), "0.5")
    with pytest.raises(StaleStoreError, match=r"0\.5/anchor was encoded with"):
        train_project(project(folder, FROZEN | {"anchor": wide(layers=[8])}), "0.5")
    with pytest.raises(StoreError, match=r"data/activations/0\.5/recipe\.json: .* no store is here, encode first"):
        train_project(project(folder), "0.5")


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"answer": {}}, {}, r"towers\.answer: unknown setting; towers has anchor, positive, shared"),
    (
        {"positive": {"cuts": 1.0}},
        {},
        r"towers\.positive\.cuts: unknown setting \(did you mean cut\?\); towers\.positive",
    ),
    ({"positive": {"cut": 1.5}}, {}, r"towers\.positive\.cut: 1\.5: a share of the blocks lies in 0\.\.1"),
    ({"positive": {"key": "no function"}}, {}, r"towers\.positive\.key: 'no function': expected module:function"),
    ({"positive": {"residency": "disk"}}, {}, r"towers\.positive\.residency: 'disk'"),
    ({"positive": {"layers": ["mpl"]}}, {}, r"towers\.positive\.layers"),
    ({"shared": True}, {}, r"shared is true, but there are no towers"),
    ({"shared": True, "positive": {"cut": 1.0}}, {}, r"shared is true, but cut differs between anchor and positive"),
    ({"anchor": {"trains": False}, "positive": {"trains": False}}, {}, r"towers: none trains"),
    ({"anchor": {}}, {"task": {"kind": "classification"}}, r"task\.kind is 'classification'; towers embed pairs"),
]


@pytest.mark.parametrize(("towers", "changes", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_settings_that_cannot_be(folder: Path, towers: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        project(folder, towers, **changes)


def test_a_source_without_pairs_is_refused(folder: Path) -> None:
    data = {"source": "text", "text": "q", "label": "a", "anchor": None, "positive": None}
    with pytest.raises(
        ConfigError, match=r"data\.source is 'text'; towers embed the anchors and the positives of pairs"
    ):
        project(folder, {"anchor": {}}, data=data)
    images = {"source": "tiny:Poisoned", "path": None, "options": {"rows": 9}, "anchor": None, "positive": None}
    with pytest.raises(DataError, match="no sample of the data has the role 'anchor'; a tower embeds those that have"):
        encode_project(project(folder, {"anchor": {}}, data=images))


def test_embeddings_of_other_sizes_and_heads_that_would_stay_random(folder: Path) -> None:
    encode_project(project(folder, {"anchor": wide()}))
    with pytest.raises(
        TrainError, match=r"differ in size \(anchor \[12\], positive \[8\]\); end towers\.<role>\.layers"
    ):
        train_project(project(folder, {"anchor": wide()}), "0.5")
    frozen = {"anchor": wide(), "positive": {"trains": False}}
    with pytest.raises(ConfigError, match=r"positive\.trains is false, but projection\.0\.bias was not pretrained"):
        train_project(project(folder, frozen, task={"layers": [6]}), "0.5")
    frozen["positive"] = {"trains": False, "layers": []}
    settings = project(folder, frozen, task={"layers": [8]})
    towers = [open_tower(part, 0.5, SampleTable.read(settings.samples)) for part in settings.parts]
    assert new_parameters(towers) == {"anchor.projection.0.weight", "anchor.projection.0.bias"}
    assert new_parameters(towers) < dict(trainable_model(towers).named_parameters()).keys()
    train_project(settings, "0.5")


def test_each_tower_says_where_its_states_lie(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose_source = pipeline.project.loaders.choose_source

    def noted(places: Any, reader: Any, device: Any, residency: Any) -> Any:
        asked.append(residency)
        return choose_source(places, reader, device, residency)

    monkeypatch.setattr(pipeline.project.loaders, "choose_source", noted)
    settings = project(folder, {"positive": {"residency": "host"}}, train={"residency": "device", "epochs": 1})
    encode_project(settings)
    train_project(settings, "0.5")
    assert asked == ["device", "host"]


def test_texts_and_images_with_stored_views_and_a_bad_sample(folder: Path, forwards: list[int]) -> None:
    data = {"source": "test_towers:Drawings", "path": None, "anchor": None, "positive": None, "options": {"broken": 7}}
    look = {"kind": "image", "image_size": 16, "augment": ["RandomHorizontalFlip"]}
    towers = {"positive": {"model": {"backbone": "test_towers:picture"}, "preprocess": look}}
    settings = project(folder, towers, data=data, encode={"cuts": [0.5], "views": 2, "max_bad": 1})
    assert encode_project(settings)
    table = SampleTable.read(settings.samples)
    assert len(table) == 70
    assert "pair 3," in Path("data/quarantine.csv").read_text()
    training = len(table.rows("train")) // 2
    stores = {path.as_posix(): len(Store.open(path).keys()) for path in stores_of(settings)}
    assert stores == {
        ANCHOR: 36,
        "data/activations/0.5/positive": 35 - training,
        "data/activations/0.5/positive/view-0": training,
        "data/activations/0.5/positive/view-1": training,
    }
    assert sum(forwards) == 36 + 35 - training + 2 * training
    train_project(settings, "0.5")
    assert export_run(settings, "0.5", folder / "model").stored < 2e-2
    before = sum(forwards)
    assert encode_project(settings)
    assert sum(forwards) == before


def test_each_tower_has_its_own_keys(folder: Path, forwards: list[int]) -> None:
    encode_project(project(folder, {"anchor": {"key": "test_towers:of_words"}}))
    assert len(Store.open(Path(ANCHOR)).keys()) == 55
    assert sum(forwards) == 110
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    turned = [{name: " ".join(text.split()[::-1]) for name, text in line.items()} for line in lines]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in turned))
    settings = project(folder, {"anchor": {"key": "test_towers:of_words"}})
    encode_project(settings)
    encoded = 110 + len({line["a"] for line in turned} - {line["a"] for line in lines})
    assert sum(forwards) == encoded > 110 + 40
    run = train_project(settings, "0.5")
    assert run.train_samples == len(SampleTable.read(settings.samples).rows("train"))
    predict_project(settings, ["0.5"], None, Path("out.jsonl"), tower="anchor")
    assert sum(forwards) == encoded


def test_towers_come_and_go_in_the_folder_of_a_cut(folder: Path) -> None:
    encode_project(project(folder))
    alone = tiny.files(Path("data/activations"))
    encode_project(project(folder, {"anchor": {}}))
    both = tiny.files(Path("data/activations"))
    assert alone.items() < both.items()
    assert CliRunner().invoke(recycle, ["store", "gc", "--cuts", "--yes"]).exit_code == 0
    towers = {name: content for name, content in both.items() if name not in alone}
    assert tiny.files(Path("data/activations")) == towers
    encode_project(project(folder))
    assert tiny.files(Path("data/activations")) == both
    encode_project(project(folder, preprocess={"kind": "text", "max_length": 4}), replace_stores=True)
    assert towers.items() < tiny.files(Path("data/activations")).items()


def test_a_tower_of_other_settings_than_its_run_is_refused_by_name(folder: Path) -> None:
    settings = project(folder, {"anchor": {"layers": [8]}})
    encode_project(settings)
    train_project(settings, "0.5")
    with pytest.raises(DataError, match=r"trained with anchor\.head\.layers = \[8\], .*params\.yaml gives \[5, 8\]"):
        export_run(project(folder, {"anchor": {"layers": [5, 8]}}), "0.5", folder / "model")
    ask = ["predict", "--model", "0.5", "--output", "out.jsonl"]
    project(folder, {"anchor": {"layers": [8]}})
    assert CliRunner().invoke(recycle, [*ask, "--tower", "positive"]).exit_code == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 55
    project(folder)
    refused = CliRunner().invoke(recycle, [*ask, "--tower", "positive"])
    assert "params.yaml has no towers; leave --tower out" in str(refused.exception)
