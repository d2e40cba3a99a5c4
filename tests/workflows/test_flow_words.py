"""The stages on tasks about words and spans: what the tokens stand for is stored, and comes back to the task."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from pipeline.data import SampleTable, open_source
from pipeline.encode.ragged import pad_batch
from pipeline.errors import StaleStoreError
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.project.model_example import from_project
from pipeline.store import Reader
from pipeline.tasks import read_tensor
from pipeline.train.loader import Loader, StoredRows
from pipeline.workflows.codec_error import measure
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

OTHERS = ("one", "two", "three")
TAGGED = {"task": {"kind": "tagging"}, "data": {"source": "conll", "path": "words.conll"}}
ASKED = {"task": {"kind": "answers"}, "data": {"source": "squad", "path": "asked.json", "window": 7, "overlap": 3}}


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with words and a network."""
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path)
    return tmp_path


def write_words(folder: Path, seed: int = 0) -> None:
    """Write sentences in which "good" is an entity, and "bad" goes on with it; questions for it."""
    draw = np.random.default_rng(seed)

    def drawn(words: tuple[str, ...], least: int, most: int) -> list[str]:
        return draw.choice(words, draw.integers(least, most)).tolist()

    tags = {"good": "B-X", "bad": "I-X"}
    sentences = [drawn((*OTHERS, "good", "good bad"), 1, 9) for _ in range(80)]
    lines = [[f"{word}\t{tags.get(word, 'O')}" for word in " ".join(words).split()] for words in sentences]
    (folder / "words.conll").write_text("".join("\n".join(one) + "\n\n" for one in lines))

    def asked(name: str) -> dict[str, object]:
        before, after = drawn(OTHERS, 0, 9), drawn(OTHERS, 0, 4)
        context = " ".join([*before, "good", "bad", *after])
        answers = [{"text": "good bad", "answer_start": context.index("good bad")}]
        return {"context": context, "qas": [{"id": name, "question": "two", "answers": answers}]}

    articles = [{"title": f"t{a}", "paragraphs": [asked(f"q{a}-{p}") for p in range(2)]} for a in range(30)]
    (folder / "asked.json").write_text(json.dumps({"version": "1.1", "data": articles}))


def project(folder: Path, given: dict[str, dict[str, object]], **changes: dict[str, object]) -> Project:
    settings: dict[str, dict[str, object]] = {
        "model": {"backbone": f"hf:{folder / 'bert'}"},
        "preprocess": {"kind": "text", "image_size": None},
        "encode": {"cuts": [0.5]},
        "train": {"epochs": 6, "lr": 0.02},
    }
    for section in (given, changes):
        settings |= {name: settings.get(name, {}) | section[name] for name in section}
    return Project.load(tiny.write_params(folder, **settings))


@pytest.mark.parametrize(("given", "extra"), [(TAGGED, "word"), (ASKED, "chars")], ids=["tagging", "answers"])
def test_what_tokens_stand_for_is_stored_as_the_preprocessing_says(folder: Path, given, extra: str) -> None:
    settings = project(folder, given)
    assert encode_project(settings)
    table = SampleTable.read(settings.samples)
    loaded = LoadedModel.open(settings, table)
    store, prefix, _ = loaded.open_store(0.5, table)
    assert store.plain.recipe.preprocessing["extra"] == extra
    source, reader = open_source(settings.data), Reader(store.path)
    for i in range(0, len(source), 7):
        sample = loaded.backbone.preprocess(source.content(i))
        stored = reader.gather(store.first_places(np.array([i])))
        assert torch.equal(stored[f"extra.{extra}"][0], sample[f"extra.{extra}"])
        assert f"input.extra.{extra}" not in stored
        alone = prefix(**{name: torch.stack([t, t]) for name, t in sample.items() if name != f"extra.{extra}"})
        for name, tensor in alone.items():
            assert torch.allclose(stored[f"state.{name}"].float()[0], tensor[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("given", "extra"), [(TAGGED, "word"), (ASKED, "chars")], ids=["tagging", "answers"])
def test_cached_losses_are_those_of_the_live_model(folder: Path, given, extra: str) -> None:
    settings = project(folder, given, encode={"dtype": "float32"})
    encode_project(settings)
    table = SampleTable.read(settings.samples)
    loaded = LoadedModel.open(settings, table)
    store, _, suffix = loaded.open_store(0.5, table)
    rows, targets = np.arange(0, 24), loaded.task.prepare(table)
    pad = loaded.backbone.preprocess.pad
    (cached,) = Loader(StoredRows(store.places, Reader(store.path)), targets, [rows], pad=pad)
    source = open_source(settings.data)
    samples = [loaded.backbone.preprocess(source.content(row)) for row in cached.rows.tolist()]
    batch = pad_batch(samples, pad)
    told = {name: torch.from_numpy(values[cached.rows.numpy()]) for name, values in targets.items()}
    told[extra] = batch.pop(f"extra.{extra}")
    assert all(torch.equal(cached.targets[name], tensor) for name, tensor in told.items())
    live = loaded.task.loss(loaded.backbone.model.eval()(**batch), told)
    assert torch.allclose(
        loaded.task.loss(suffix.eval()(cached.state, **cached.inputs), cached.targets), live, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("cut", [0.0, 0.5])
def test_tagging_learns_and_is_exported(folder: Path, cut: float) -> None:
    settings = project(folder, TAGGED, encode={"cuts": [cut]})
    encode_project(settings)
    run = train_project(settings, str(cut))
    assert run.metric == "f1"
    assert run.value > max(0.6, run.initial + 0.2)
    assert {"validation/precision", "validation/recall", "validation/accuracy"} < run.history[-1].keys()
    parity = export_run(settings, str(cut), folder / "model")
    assert parity.merged < 1e-5
    assert parity.agreement > 0.95
    assert json.loads((folder / "model/config.json").read_text())["architectures"] == ["BertForTokenClassification"]


@pytest.mark.parametrize("cut", [0.0, 0.5])
def test_answers_learn_and_are_exported(folder: Path, cut: float) -> None:
    settings = project(folder, ASKED, encode={"cuts": [cut]})
    encode_project(settings)
    run = train_project(settings, str(cut))
    assert run.metric == "f1"
    assert run.value > max(0.6, run.initial + 0.2)
    assert run.history[-1]["validation/exact_match"] > 0.6
    assert export_run(settings, str(cut), folder / "model").merged < 1e-5
    assert json.loads((folder / "model/config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]


@pytest.mark.parametrize("given", [TAGGED, ASKED], ids=["tagging", "answers"])
def test_adapters_train(folder: Path, given) -> None:
    encode_project(project(folder, given))
    run = train_project(project(folder, given, train={"adapter": "lora"}), "0.5")
    assert run.value > run.initial
    assert export_run(project(folder, given), "0.5", folder / "model").merged < 1e-5


def test_a_new_tag_encodes_nothing(folder: Path) -> None:
    encode_project(project(folder, TAGGED))
    before = tiny.files(folder / "data/activations")
    text = (folder / "words.conll").read_text()
    (folder / "words.conll").write_text(text.replace("-X", "-Y"))
    encode_project(project(folder, TAGGED))
    assert tiny.files(folder / "data/activations") == before
    assert "B-Y" in np.concatenate(SampleTable.read(folder / "data/samples.parquet").targets["tags"]).tolist()


def test_stores_of_other_tasks_know_of_no_extras(folder: Path) -> None:
    lines = [json.dumps({"text": f"{a} {b}", "label": a}) + "\n" for a in OTHERS for b in OTHERS]
    (folder / "texts.jsonl").write_text("".join(lines))
    data = {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"}
    encode_project(project(folder, {"data": data}))
    recipe = json.loads((folder / "data/activations/0.5/recipe.json").read_text())
    assert set(recipe["preprocessing"]) == {"kind", "inputs", "max_length", "tokenizer"}
    assert not [path for path in folder.glob("data/activations/**/*") if path.name.startswith("extra.")]


def test_words_and_texts_are_other_recipes(folder: Path) -> None:
    tagging = project(folder, TAGGED)
    encode_project(tagging)
    tagged = (SampleTable.read(tagging.samples), json.loads((folder / "data/activations/0.5/recipe.json").read_text()))
    assert tagged[1]["preprocessing"]["extra"] == "word"
    asking = project(folder, ASKED)
    encode_project(asking, replace_stores=True)
    tagged[0].write(tagging.samples)
    with pytest.raises(StaleStoreError, match=r"preprocessing\.extra"):
        train_project(tagging, "0.5")


class Tagger(torch.nn.Module):
    """A text network of the user's own with logits for every token."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        self.classifier = torch.nn.Linear(8, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.classifier(hidden)


def tagger(head) -> torch.nn.Module:
    assert head.kind == "tokens"
    return Tagger(head.size)


def test_a_network_of_ones_own_may_tag(folder: Path) -> None:
    own = project(
        folder,
        TAGGED,
        model={"backbone": "test_flow_words:tagger"},
        preprocess={"tokenizer": str(folder / "bert")},
    )
    encode_project(own)
    assert train_project(own, "0.5").value > 0.8


def predicted(settings: Project, inputs: str | None) -> list[dict[str, Any]]:
    assert predict_project(settings, ["0.5"], inputs, Path("out.jsonl"))
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_words_are_tagged_as_in_training_with_tags_or_without(folder: Path) -> None:
    settings = project(folder, TAGGED)
    encode_project(settings)
    run = train_project(settings, "0.5")
    table, rows = SampleTable.read(settings.samples), predicted(settings, None)
    found = {row["key"]: row["tags"] for row in rows}
    right = {key.tobytes().hex(): tags for key, tags in zip(table.keys, table.targets["tags"], strict=True)}
    held_out = [table.keys[row].tobytes().hex() for row in table.rows("validation")]
    hits = [one == other for key in held_out for one, other in zip(found[key], right[key], strict=True)]
    assert np.mean(hits) == pytest.approx(run.history[run.best_epoch - 1]["validation/accuracy"])
    source = open_source(settings.data)
    words = [source.content(i) for i in range(0, 80, 9)] + [["bad", "good", "three"]]
    (folder / "new.conll").write_text("\n\n".join("\n".join(sentence) for sentence in words))
    again = predicted(settings, "new.conll")
    assert [row["tags"] for row in again[:-1]] == [rows[i]["tags"] for i in range(0, 80, 9)]
    assert len(again[-1]["tags"]) == 3


def test_questions_without_answers_are_answered(folder: Path) -> None:
    settings = project(folder, ASKED)
    encode_project(settings)
    train_project(settings, "0.5")
    context = "one two good bad three one two"
    question = {"id": "new", "question": "two"}
    article = {"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}
    (folder / "new.json").write_text(json.dumps({"data": [article]}))
    (row,) = predicted(settings, "new.json")
    assert row["question"] == "new"
    assert row["answer"] == context[row["start"] : row["end"]] == "good bad"
    assert np.isfinite(row["margin"])


@pytest.mark.parametrize(("given", "kind"), [(TAGGED, "tokens"), (ASKED, "span")], ids=["tagging", "answers"])
def test_other_verbs_know_these_heads(folder: Path, given, kind: str) -> None:
    settings = project(folder, given)
    encode_project(settings)
    report = measure(settings, "0.5", 20)
    assert report.kind == kind
    assert report.deviations[0].output_largest < 1e-6
    subject = from_project(settings, None, {}, classes=2, batch=3)
    assert all(not name.startswith("extra.") for name in subject.inputs)
    assert read_tensor(subject.model.eval()(**subject.inputs)).shape[0] == 3
