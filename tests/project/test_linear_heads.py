"""Linear heads on states: the closed forms, and every task scored on what its data decide."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.models.backbone import ArrayPreprocess, Backbone
from pipeline.project import Project
from pipeline.project.linear_heads import SHRINKAGE, _channel_axis, _draw, _LinearHead, score_linear_heads
from pipeline.project.model_example import from_project
from pipeline.split import split
from pipeline.tasks import IGNORED, Head, Task
from pipeline.tasks.similarity import Similarity
from stages import cli

WORDS = ("one", "two", "three", "good", "bad")


class Regions(nn.Module):
    """Two blocks that keep everything, and one that keeps only the first channel."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])
        for block in self.blocks:
            nn.init.dirac_(block.weight)
        with torch.no_grad():
            self.blocks[2].weight[1:] = 0
        self.fc = nn.Linear(4, head.size or 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def regions(head: Head) -> Backbone:
    return Backbone(Regions(head), ArrayPreprocess("x"), "regions", frozenset({"fc.weight", "fc.bias"}))


def array_project(folder: Path, labels: np.ndarray, task: dict[str, object]) -> Project:
    """Arrays of noise whose channel 1 has the label as its mean: lost in the last block."""
    draw = np.random.default_rng(0)
    arrays = draw.normal(size=(len(labels), 4, 5, 5)).astype(np.float32)
    arrays[:, 1] += np.asarray(labels, np.float32)[:, None, None]
    np.savez(folder / "arrays.npz", x=arrays, y=labels)
    return Project.load(
        tiny.write_params(
            folder,
            data={"source": "arrays", "path": "arrays.npz", "validation": 0.3},
            model={"backbone": f"{__name__}:regions"},
            preprocess={"kind": "array", "image_size": None},
            task=task,
        )
    )


def scores(project: Project, *cuts: str | float) -> list[float]:
    example = from_project(project, project.model.weights, {}, classes=2, batch=2)
    assert example.data is not None
    prefixes = [split(example.model, cut, example.inputs)[0] for cut in cuts]
    return score_linear_heads(example.data, prefixes, samples=200)


def test_a_ridge_is_the_solution_of_its_equations() -> None:
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(60, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    x[:, 4] = 3  # a constant channel
    y = x[:, :2] @ torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64) + 7 + noise[:, :2]
    head = _LinearHead(per_token=False, size=None)
    for part in (slice(0, 20), slice(20, 60)):
        head.add(x[part], y[part].float())
    head.solve()
    centred, target = x - x.mean(0), y.float().double() - y.float().double().mean(0)
    gram = centred.T @ centred
    weight = torch.linalg.pinv(gram + SHRINKAGE * gram.diagonal().diag()) @ centred.T @ target
    assert torch.allclose(head(x), (centred @ weight + y.mean(0)).float(), atol=1e-4)


def test_tokens_without_a_target_are_left_out() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 7, 3, generator=draw, dtype=torch.float64)
    wanted = x[..., :1].float().clone()
    wanted[:, 4:] = torch.nan
    poisoned = x.clone()
    poisoned[:, 4:] = 1e6
    heads = [_LinearHead(per_token=True, size=None) for _ in range(2)]
    heads[0].add(x[:, :4], wanted[:, :4])
    heads[1].add(poisoned, wanted)
    for head in heads:
        head.solve()
    assert torch.allclose(heads[0](x), heads[1](x))


def test_an_embedding_shrinks_differences_within_groups() -> None:
    draw = torch.Generator().manual_seed(0)
    group = torch.arange(40).repeat_interleave(10)
    within = torch.randn(400, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 10, 100])
    x = within + 50 * torch.randn(40, 3, generator=draw, dtype=torch.float64)[group]
    head = _LinearHead(per_token=False, size=None)
    for order in torch.randperm(400, generator=draw).split(64):  # groups are spread over batches
        head.add(x[order], group[order])
    head.solve()
    means = torch.stack([x[group == g].mean(0) for g in range(40)])
    inner = (x - means[group]).T.cov(correction=0)
    inner += SHRINKAGE * inner.diagonal().diag()
    differences = x - x.mean(0)
    distances = (differences @ torch.linalg.inv(inner) * differences).sum(1)
    assert torch.allclose(head(x).double().square().sum(1), distances, rtol=1e-4)


def test_classes_are_told_apart_as_by_discriminant_analysis() -> None:
    draw = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor([0.9, 0.08, 0.02]), 600, replacement=True, generator=draw)
    x = torch.randn(600, 3, generator=draw, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)[label]
    head = _LinearHead(per_token=False, size=4)  # one class has no sample
    head.add(x[:100], label[:100])
    head.add(x[100:], label[100:].where(label[100:] != 2, IGNORED))
    head.solve()
    kept = torch.cat([label[:100] >= 0, label[100:] != 2])
    logits = head(x)
    assert torch.isinf(logits[:, 3]).all()
    means = torch.stack([x[kept & (label == k)].mean(0) for k in range(3)])
    inner = (x - means[label])[kept].T.cov(correction=0)
    inverse = torch.linalg.inv(inner + SHRINKAGE * inner.diagonal().diag())
    expected = -0.5 * torch.stack([((x - mean) @ inverse * (x - mean)).sum(1) for mean in means], 1)
    expected += torch.tensor([(kept & (label == k)).sum() / kept.sum() for k in range(3)]).log()
    assert torch.allclose(logits[:, :3].softmax(1), expected.softmax(1).float(), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 3), 1), ((8, 5, 7), 2), ((8, 3, 9, 9), 1), ((8, 9, 9, 3), 3), ((8, 3, 4, 9, 9), 1)]
)
def test_the_channels_are_found(shape: tuple[int, ...], axis: int) -> None:
    assert _channel_axis(torch.Size(shape)) == axis


@pytest.mark.parametrize(
    ("task", "lost"),
    [
        ({"kind": "classification"}, 0.6),
        ({"kind": "similarity", "monitor": "precision_at_1"}, 0.6),
        ({"kind": "regression", "monitor": "r2"}, 0.1),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_score_falls_where_a_block_loses_what_the_task_needs(tmp_path: Path, monkeypatch, task, lost: float) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.random.default_rng(1).integers(0, 3, 150) * 2
    project = array_project(tmp_path, labels.astype(np.float64) if task["kind"] == "regression" else labels, task)
    before, after = scores(project, "blocks.2", "fc")
    assert before > 0.9
    assert after < lost


@pytest.mark.parametrize("kind", ["tagging", "answers"])
def test_heads_on_tokens_find_words(tmp_path: Path, text_folder: Path, monkeypatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    tagged = [draw.choice(["one", "good"], draw.integers(2, 9)) for _ in range(80)]
    tags = [[f"{word}\t{'B-X' if word == 'good' else 'O'}" for word in words] for words in tagged]
    Path("words.conll").write_text("".join("\n".join(one) + "\n\n" for one in tags))
    sentences = [[*draw.choice(WORDS[:3], draw.integers(1, 6)), "good", *draw.choice(WORDS[:3], 2)] for _ in range(80)]
    paragraphs = []
    for number, text in enumerate(map(" ".join, sentences)):
        answer = {"text": "good", "answer_start": text.index("good")}
        paragraphs.append({"context": text, "qas": [{"id": f"q{number}", "question": "two", "answers": [answer]}]})
    squad = {"data": [{"title": f"t{number}", "paragraphs": [one]} for number, one in enumerate(paragraphs)]}
    Path("asked.json").write_text(json.dumps(squad))
    of_kind = {"tagging": ("conll", "words.conll"), "answers": ("squad", "asked.json")}
    source, path = of_kind[kind]
    data = {"source": source, "path": path} | ({"window": 9, "overlap": 3} if kind == "answers" else {})
    params = tiny.write_params(
        tmp_path,
        data=data,
        task={"kind": kind},
        model={"backbone": f"hf:{tmp_path / 'bert'}"},
        preprocess={"kind": "text", "image_size": None},
    )
    (score,) = scores(Project.load(params), 0.5)
    assert score > 0.8


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(12))
    return tiny.write_params(tmp_path)


def test_the_command_shows_and_draws_the_scores_of_every_cut(photos: Path) -> None:
    result = CliRunner().invoke(cli.recycle, ["cuts", "--probe", "--json", "--plot", "cuts.png"])
    assert result.exception is None
    options = json.loads(result.stdout)
    known = [option["linear_score"] for option in options]
    assert all(0 <= score <= 1 for score in known)
    from_the_end = list(itertools.accumulate(reversed(known), max))[::-1]
    assert [option["linear_from_here"] for option in options] == from_the_end
    assert Path("cuts.png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(cli.recycle, ["cuts", "--probe"]).stdout
    assert "linear head from here on" in shown


def test_without_data_there_is_nothing_to_fit_heads_to(photos: Path) -> None:
    result = CliRunner().invoke(cli.recycle, ["cuts", "timm:test_vit", "--probe"])
    assert isinstance(result.exception, ConfigError)
    assert "--probe" in str(result.exception)


def test_a_task_without_a_linear_head_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tasks.classification.Classification.linear_target", Task.linear_target)
    with pytest.raises(ConfigError, match=r"task.kind is 'classification', which has no linear head"):
        scores(Project.load(photos), 0.5)


def test_a_split_that_cannot_be_decoded_is_told(photos: Path) -> None:
    project = Project.load(photos)
    example = from_project(project, project.model.weights, {}, classes=2, batch=2)
    assert example.data is not None
    for path in Path("photos").rglob("*.png"):
        path.write_bytes(b"no image")
    (prefix,) = [split(example.model, 0.5, example.inputs)[0]]
    with pytest.raises(DataError, match="no train sample can be decoded"):
        score_linear_heads(example.data, [prefix], samples=20)


def test_pairs_are_drawn_whole() -> None:
    rows = _draw(np.arange(100).reshape(50, 2), 20, seed=0)
    assert len(rows) == 20
    assert set(rows.tolist()) == {row + other for row in rows.tolist() if row % 2 == 0 for other in (0, 1)}
    assert Similarity.linear_target is not Task.linear_target
