"""What every loss promises, alone and with a memory; and formulas that are ours."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.errors import ConfigError, DataError, TrainError
from pipeline.tasks import TaskConfig, open_task
from pipeline.tasks.losses import CenterLoss, Memory, SoftmaxLoss, make_loss
from pipeline.tasks.similarity import Similarity
from pipeline.train.order import batches

LABELS, EACH, FEATURES, WIDTH = 6, 8, 24, 8
OF_PAIRS = (
    *("circle", "contrastive", "multi_similarity", "multiple_negatives", "ntxent", "online_contrastive"),
    *("supcon", "triplet_margin"),
)
OF_LABELS = (
    *("arcface", "center", "cosface", "fastap", "normalized_softmax", "proxy_anchor", "proxy_nca", "soft_triple"),
    *("softmax", "sub_center_arcface"),
)
CASES: list[dict[str, Any]] = [
    *({"loss": loss} for loss in [*OF_PAIRS, *OF_LABELS]),
    *({"loss": loss, "memory": 40} for loss in OF_PAIRS),
    *({"loss": "triplet_margin", "miner": "triplet_margin", "miner_options": {"type_of_triplets": kind}}
      for kind in ("all", "hard", "semihard")),
    {"loss": "triplet_margin", "miner": "batch_hard", "memory": 40},
    {"loss": "contrastive", "miner": "hdc"},
    {"loss": "contrastive", "miner": "pair_margin"},
    {"loss": "multi_similarity", "miner": "batch_easy_hard"},
    {"loss": "contrastive", "distance": "euclidean"},
    {"loss": "online_contrastive", "distance": "euclidean", "memory": 40},
    {"loss": "triplet_margin", "distance": "manhattan", "miner": "batch_hard", "loss_options": {"margin": 1.0}},
    {"loss": "multiple_negatives", "distance": "dot", "loss_options": {"temperature": 1.0}},
]  # fmt: skip


class Table:
    """Samples of some labels in three splits; as pairs, two neighbours make one under the label as their group."""

    def __init__(self, pairs: bool = False) -> None:
        labels = np.repeat(np.arange(LABELS), EACH)
        names = np.array([f"label {label}" for label in labels])
        self.split = np.where(np.arange(len(labels)) % EACH < EACH // 2, "train", "validation")
        self.targets: dict[str, np.ndarray] = {"label": names}
        if pairs:
            count = len(labels) // 2
            roles = np.array(["anchor", "positive"] * count)
            self.targets = {"pair": np.repeat(np.arange(count), 2), "role": roles, "group": names}
        draw = torch.Generator().manual_seed(7)
        centers = torch.randn(LABELS, FEATURES, generator=draw)
        self.inputs = centers[labels] + torch.randn(len(labels), FEATURES, generator=draw)


def opened(settings: dict[str, Any], table: Table) -> tuple[Similarity, dict[str, Tensor]]:
    task = open_task(TaskConfig(kind="similarity", **{"samples_per_label": 3} | settings))
    assert isinstance(task, Similarity)
    task = task.of_width(WIDTH)
    return task, {name: torch.from_numpy(values) for name, values in task.prepare(table).items()}


def score(task: Similarity, model: nn.Module, table: Table, targets: dict[str, Tensor]) -> dict[str, float]:
    rows = table.split == "validation"
    metrics = task.metrics()
    with torch.no_grad():
        metrics.update(model(table.inputs[rows]), {name: values[rows] for name, values in targets.items()})
    return metrics.compute()


def train(settings: dict[str, Any], *, pairs: bool, epochs: int = 25) -> tuple[list[float], list[dict[str, float]]]:
    """Train a linear embedding; return the loss of each epoch, and the scores before and after."""
    table = Table(pairs)
    task, targets = opened(settings, table)
    torch.manual_seed(1)
    model = nn.Linear(FEATURES, WIDTH)
    own = [] if task.loss_module is None else list(task.loss_module.parameters())
    optimizer = torch.optim.Adam([*model.parameters(), *own], lr=0.01)
    scores, losses = [score(task, model, table, targets)], []
    for epoch in range(epochs):
        units, total = task.units(table, "train", seed=1, epoch=epoch), 0.0
        for rows in batches(units, 6, seed=1, epoch=epoch, shuffle=True):
            optimizer.zero_grad()
            loss = task.loss(model(table.inputs[rows]), {name: values[rows] for name, values in targets.items()})
            assert loss.shape == ()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total)
    assert np.isfinite(losses).all()
    return losses, [*scores, score(task, model, table, targets)]


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [*((case, False) for case in CASES), *((case, True) for case in CASES if case["loss"] in OF_PAIRS)],
    ids=str,
)
def test_a_toy_problem_is_learnt_reproducibly(settings: dict[str, Any], pairs: bool) -> None:
    losses, (before, after) = train(settings, pairs=pairs)
    assert after["r_precision"] > before["r_precision"] + 0.15
    assert losses[-1] < losses[0] / 1.3
    assert train(settings, pairs=pairs, epochs=3)[0] == losses[:3]


@pytest.mark.parametrize("settings", [{"loss": loss} for loss in OF_PAIRS], ids=str)
def test_gradients_reach_both_sides_of_pairs_past_a_memory(settings: dict[str, Any]) -> None:
    table = Table(pairs=True)
    for memory in (None, 40):
        task, targets = opened({**settings, "memory": memory}, table)
        output = torch.randn(len(table.split), WIDTH, requires_grad=True)
        task.loss(output, targets).backward()
        assert output.grad is not None
        assert output.grad[0::2].abs().sum() > 0
        assert output.grad[1::2].abs().sum() > 0


def test_losses_run_in_full_precision_under_autocast() -> None:
    table = Table()
    task, targets = opened({}, table)
    output = torch.randn(len(table.split), WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = task.loss(output, targets)
    assert within == task.loss(output, targets)


def test_the_memory_is_earlier_batches() -> None:
    """With a memory, a batch is compared with itself and with what came before, this batch included."""
    table = Table()
    task, targets = opened({"memory": 48}, table)
    plain = make_loss("multiple_negatives", {}, "cosine")
    output, groups = torch.randn(len(table.split), WIDTH), targets["group"]
    first, second = slice(0, 12), slice(12, 24)
    task.loss(output[first], {"group": groups[first]})
    found = task.loss(output[second], {"group": groups[second]})
    same, other = groups[second][:, None] == groups[:24], groups[second][:, None] != groups[:24]
    same[torch.arange(12), torch.arange(12, 24)] = False  # none is compared with itself
    pairs = (*torch.where(same), *torch.where(other))
    expected = plain(output[second], groups[second])
    expected = expected + plain(output[second], groups[second], pairs, output[:24], groups[:24])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_memory_goes_on_where_its_checkpoint_was() -> None:
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed)), torch.tensor([0, 0, 1, 1, 2, 2])

    undisturbed, killed, resumed = (Memory(make_loss("contrastive", {}, "cosine"), WIDTH, 15) for _ in range(3))
    for seed in range(4):  # beyond its end: it wraps around
        assert undisturbed(*batch(seed)) == killed(*batch(seed))
    resumed.load_state_dict(killed.state_dict())
    for seed in range(4, 9):
        assert undisturbed(*batch(seed)) == resumed(*batch(seed))


def test_softmax_is_cross_entropy_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    loss, embeddings, labels = SoftmaxLoss(4, WIDTH), torch.randn(9, WIDTH), torch.arange(9) % 4
    assert loss(embeddings, labels).item() == pytest.approx(cross_entropy(embeddings @ loss.W, labels).item(), rel=1e-5)


def test_center_loss_follows_its_paper() -> None:
    """Equation 5 is the loss, equation 4 moves the centres, of those labels alone that the batch has."""
    torch.manual_seed(0)
    weight, rate = 0.1, 0.4
    loss = CenterLoss(3, 2, weight=weight, rate=rate)
    loss.centers_LD.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    embeddings, labels = torch.randn(5, 2, requires_grad=True), torch.tensor([0, 0, 1, 0, 1])
    before = loss.centers_LD.clone()
    apart = [float((x - before[y]) @ (x - before[y])) for x, y in zip(embeddings.detach(), labels, strict=True)]
    found = loss(embeddings, labels)
    expected = cross_entropy(embeddings @ loss.softmax.W, labels).item() + weight / 2 * np.mean(apart)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    for label, count in ((0, 3), (1, 2)):
        move = sum(before[label] - x for x in embeddings.detach()[labels == label]) / (1 + count)
        assert torch.allclose(loss.centers_LD[label], before[label] - rate * move)
    assert torch.equal(loss.centers_LD[2], before[2])


def test_online_contrastive_learns_from_hard_pairs_alone() -> None:
    """Positives further than the nearest negative of their anchor, negatives nearer than the furthest positive."""
    angles = torch.tensor([0.0, 0.1, 0.5, 0.3, 2.0, 2.2])
    output = torch.stack([angles.cos(), angles.sin()], dim=1)
    table = Table()
    task, _ = opened({"loss": "online_contrastive"}, table)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    cosines, same = (output @ output.T).numpy(), (groups[:, None] == groups).numpy()
    positives, negatives = [], []
    for i in range(6):
        mine = same[i] & (np.arange(6) != i)
        positives += [c for c in cosines[i][mine] if c < cosines[i][~same[i]].max()]
        negatives += [c for c in cosines[i][~same[i]] if c > cosines[i][mine].min()]
    pulls, pushes = 1 - np.array(positives), np.maximum(negatives, 0)
    assert 0 < len(positives) < 12
    expected = pulls[pulls > 0].mean() + pushes[pushes > 0].mean()
    assert task.loss(output, {"group": groups}).item() == pytest.approx(expected, rel=1e-4)


def test_the_miner_has_the_margin_of_the_loss() -> None:
    settings = {"loss": "triplet_margin", "miner": "triplet_margin"}
    for options, margin in (({}, 0.2), ({"loss_options": {"margin": 0.7}}, 0.7), ({"miner_options": {"margin": 2}}, 2)):
        task = open_task(TaskConfig(kind="similarity", **settings, **options))
        assert isinstance(task, Similarity)
        assert task._miner.margin == margin


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "circle", "distance": "dot"}, "the loss circle is made for cosine: remove task.distance, or set"),
        ({"miner": "angular", "distance": "euclidean"}, "the miner angular is made for cosine"),
        ({"loss": "fastap", "memory": 9}, "task.memory is 9; loss fastap compares no sample with another batch's"),
        ({"loss": "arcface", "memory": 9}, "task.memory is 9; loss arcface"),
        ({"loss_options": {"temperature": "warm"}}, "task.loss_options.temperature is 'warm'; .* expects a number"),
        (
            {"miner": "triplet_margin", "miner_options": {"type_of_triplets": "semi-hard"}},
            "task.miner_options.type_of_triplets is 'semi-hard'; .* expects one of all, hard, semihard, easy",
        ),
        ({"loss": "triplet_margin", "loss_options": {"swap": "yes"}}, "swap is 'yes'; .* expects true or false"),
        ({"loss": "online_contrastive", "miner": "hdc"}, "task.miner is 'hdc'; online_contrastive brings its own"),
        ({"miner": "batch_hard", "miner_options": {"pos_strategy": "easy"}}, "BatchHardMiner does not take it"),
    ],
)
def test_what_does_not_fit_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_task(TaskConfig(kind="similarity", **settings))


@pytest.mark.parametrize("settings", [{"loss": "softmax"}, {"memory": 64}])
def test_the_embeddings_size_must_be_known(settings: dict[str, Any]) -> None:
    task = open_task(TaskConfig(kind="similarity", layers=["gated"], **settings))
    with pytest.raises(TrainError, match="call prepare"):
        task.loss(torch.ones(2, WIDTH), {"group": torch.tensor([0, 1])})
    with pytest.raises(ConfigError, match="must know the size of the embeddings"):
        task.prepare(Table())
    open_task(TaskConfig(kind="similarity", layers=[4, "gated"], **settings)).prepare(Table())


def test_a_memory_smaller_than_a_batch_is_refused() -> None:
    table = Table()
    task, targets = opened({"memory": 5}, table)
    with pytest.raises(TrainError, match=r"task\.memory is 5 embeddings; a batch brings 48"):
        task.loss(torch.ones(48, WIDTH), targets)


@pytest.mark.parametrize("loss", OF_LABELS)
def test_losses_of_labels_are_refused_for_pairs(loss: str) -> None:
    with pytest.raises(ConfigError, match=f"task.loss is '{loss}', which needs labels"):
        opened({"loss": loss}, Table(pairs=True))


@pytest.mark.parametrize("pairs", [False, True])
def test_an_empty_validation_split_is_told(pairs: bool) -> None:
    table = Table(pairs)
    table.split = np.full(len(table.split), "train")
    with pytest.raises(DataError, match="the validation split"):
        opened({}, table)


def test_labels_that_are_no_names() -> None:
    table = Table()
    table.targets = {"label": np.linspace(0, 1, len(table.split))}
    with pytest.raises(DataError, match="the labels are float64"):
        opened({}, table)
