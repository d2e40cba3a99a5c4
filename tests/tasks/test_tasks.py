"""What every task promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, TrainError
from pipeline.order import batches
from pipeline.tasks import Head, Task, TaskConfig, open_task, read_tensor

WIDTH = 6


@dataclass
class Rows:
    """A sample table as tasks see it."""

    split: np.ndarray
    targets: dict[str, np.ndarray] = field(default_factory=dict)


def labelled(train: list[Any], validation: list[Any]) -> Rows:
    split = np.array(["train"] * len(train) + ["validation"] * len(validation))
    return Rows(split, {"label": np.array(train + validation)})


def paired(train: int, validation: int) -> Rows:
    count = train + validation
    split = np.repeat(np.where(np.arange(count) < train, "train", "validation"), 2)
    groups = np.array([f"g{i}" for i in range(count)])
    roles = np.array(["anchor", "positive"] * count)
    return Rows(split, {"pair": np.repeat(np.arange(count), 2), "role": roles, "group": np.repeat(groups, 2)})


LABELS = labelled([3, 1, 3, 1, 1, 3, 2, 2], [1, 2, 3, 2])
PAIRS = paired(6, 3)


class TaskContract:
    """A subclass gives the section `task:`, a table, and an output that is right for its rows."""

    settings: Mapping[str, Any]
    table: Rows

    def right(self, targets: Mapping[str, Tensor], table: Rows) -> Tensor:
        """Return the output (B, W) of a model that is never wrong."""
        raise NotImplementedError

    @pytest.fixture
    def task(self) -> Task:
        return open_task(TaskConfig(**self.settings))

    def batch(self, task: Task, rows: np.ndarray) -> dict[str, Tensor]:
        return {name: torch.from_numpy(values[rows]) for name, values in task.prepare(self.table).items()}

    def test_asks_for_a_head(self, task: Task) -> None:
        head = task.head(self.table)
        assert head == task.head(self.table)
        assert (head.size is not None) == (head.kind == "classes")

    def test_targets_are_numbers_row_by_row(self, task: Task) -> None:
        prepared = task.prepare(self.table)
        assert all(len(values) == len(self.table.split) and values.dtype == np.int64 for values in prepared.values())
        again = task.prepare(self.table)
        assert all(np.array_equal(again[name], values) for name, values in prepared.items())

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_units_cover_their_split(self, task: Task, split: str) -> None:
        units = task.units(self.table, split, seed=1, epoch=2)
        rows = np.concatenate([np.atleast_1d(unit) for unit in units])
        assert np.array_equal(np.unique(rows), np.flatnonzero(self.table.split == split))
        if split == "validation":
            assert len(rows) == len(np.unique(rows))

    def test_units_are_a_pure_function_that_order_takes(self, task: Task) -> None:
        drawn = [
            batches(task.units(self.table, "train", seed=1, epoch=epoch), 2, seed=1, epoch=epoch, shuffle=True)
            for epoch in (0, 0, 1)
        ]
        assert all(np.array_equal(one, same) for one, same in zip(drawn[0], drawn[1], strict=True))
        assert not np.array_equal(np.concatenate(drawn[0]), np.concatenate(drawn[2]))

    def test_loss_is_a_scalar_with_a_gradient_and_falls(self, task: Task) -> None:
        rows = batches(task.units(self.table, "train"), 100, seed=0, epoch=0, shuffle=False)[0]
        targets = self.batch(task, rows)
        torch.manual_seed(0)
        output = torch.randn(len(rows), self.right(targets, self.table).shape[1], requires_grad=True)
        extra = [] if task.loss_module is None else list(task.loss_module.parameters())
        optimizer = torch.optim.SGD([output, *extra], lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = task.loss(output, targets)
            assert loss.shape == ()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert np.isfinite(losses).all()

    def test_half_precision_outputs_are_fine(self, task: Task) -> None:
        rows = batches(task.units(self.table, "train"), 100, seed=0, epoch=0, shuffle=False)[0]
        targets = self.batch(task, rows)
        assert task.loss(self.right(targets, self.table).to(torch.bfloat16), targets).dtype == torch.float32

    def test_scores_of_a_model_that_is_never_wrong(self, task: Task) -> None:
        metrics = task.metrics()
        for round_ in range(2):
            for rows in batches(task.units(self.table, "validation"), 2, seed=0, epoch=0, shuffle=False):
                targets = self.batch(task, rows)
                metrics.update(self.right(targets, self.table), targets)
            scores = metrics.compute()
            assert task.monitor in scores
            assert all(type(score) is float for score in scores.values())
            assert scores == pytest.approx(dict.fromkeys(scores, 1.0)), f"after {round_} resets"
            metrics.reset()

    def test_scores_of_nothing_are_not_numbers(self, task: Task) -> None:
        assert np.isnan(task.metrics().compute()[task.monitor])


class TestClassification(TaskContract):
    settings: Mapping[str, Any] = {}
    table = LABELS

    def right(self, targets: Mapping[str, Tensor], table: Rows) -> Tensor:
        return 9 * nn.functional.one_hot(targets["label"], 3).float()


class TestSmoothedClassification(TestClassification):
    settings: Mapping[str, Any] = {"label_smoothing": 0.1, "monitor": "macro_f1"}


class SimilarityContract(TaskContract):
    def right(self, targets: Mapping[str, Tensor], table: Rows) -> Tensor:
        return nn.functional.one_hot(targets["group"], 12).float()


class TestPairs(SimilarityContract):
    settings: Mapping[str, Any] = {"kind": "similarity"}
    table = PAIRS


class TestSymmetricPairs(TestPairs):
    settings: Mapping[str, Any] = {"kind": "similarity", "symmetric": True, "loss_options": {"temperature": 0.1}}


class TestPairsByTriplets(TestPairs):
    settings: Mapping[str, Any] = {
        "kind": "similarity",
        "loss": "triplet_margin",
        "loss_options": {"margin": 0.2},
        "miner": "batch_hard",
    }


class TestLabels(SimilarityContract):
    settings: Mapping[str, Any] = {"kind": "similarity", "samples_per_label": 2, "monitor": "r_precision"}
    table = labelled([3, 1, 3, 1, 1, 3, 2, 2], [7, 8, 8, 7])


class TestContrastive(TestLabels):
    settings: Mapping[str, Any] = TestLabels.settings | {"loss": "contrastive"}


class TestCircle(TestLabels):
    settings: Mapping[str, Any] = TestLabels.settings | {"loss": "circle"}


class TestMultiSimilarity(TestLabels):
    settings: Mapping[str, Any] = TestLabels.settings | {"loss": "multi_similarity", "miner": "multi_similarity"}


class TestSupcon(TestLabels):
    settings: Mapping[str, Any] = TestLabels.settings | {"loss": "supcon"}


class TestArcface(TestLabels):
    settings: Mapping[str, Any] = TestLabels.settings | {"loss": "arcface", "layers": [12]}

    def test_its_weights_are_for_the_labels_of_training_and_stay(self, task: Task) -> None:
        assert task.loss_module is None
        targets = task.prepare(self.table)
        assert task.loss_module is not None
        before = next(task.loss_module.parameters())
        assert before.shape == (12, 3)
        assert targets["group"][self.table.split == "train"].max() == 2
        task.prepare(self.table)
        assert next(task.loss_module.parameters()) is before
        again = open_task(TaskConfig(**self.settings))
        again.prepare(self.table)
        assert again.loss_module is not None
        assert torch.equal(next(again.loss_module.parameters()), before)


class TestCosface(TestArcface):
    settings: Mapping[str, Any] = TestArcface.settings | {"loss": "cosface"}


class TestNormalizedSoftmax(TestArcface):
    settings: Mapping[str, Any] = TestArcface.settings | {"loss": "normalized_softmax"}


@dataclass
class Output:
    logits: Any


def test_the_tensor_is_found_in_what_models_return() -> None:
    tensor = torch.ones(2)
    for output in (tensor, Output(tensor), {"logits": tensor}, (tensor, 1), [tensor], Output((tensor,))):
        assert read_tensor(output) is tensor
    for output in ("text", {}, (), Output(None)):
        with pytest.raises(TrainError, match="the model returned"):
            read_tensor(output)


def make_task(config: TaskConfig) -> Task:
    return open_task(TaskConfig(label_smoothing=config.options["smooth"]))


def make_nothing(config: TaskConfig) -> int:
    return 3


def test_own_tasks() -> None:
    assert open_task(TaskConfig(kind=f"{__name__}:make_task", options={"smooth": 0.5})).name == "classification"
    with pytest.raises(ConfigError, match="returned int; expected a Task"):
        open_task(TaskConfig(kind=f"{__name__}:make_nothing"))


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        ({"kind": "regression"}, ["kind is 'regression'; expected one of classification, similarity"]),
        ({"loss": "circle", "layers": [4]}, ["loss is 'circle', which kind classification does not use", "layers is"]),
        ({"monitor": "recall"}, ["monitor is 'recall'; classification has accuracy, macro_f1"]),
        ({"kind": "similarity", "label_smoothing": 0.1}, ["label_smoothing is 0.1"]),
        ({"kind": "similarity", "miner_options": {"a": 1}}, ["no miner is set"]),
        ({"kind": "similarity", "monitor": "precision_at_5"}, ["similarity has precision_at_1, reciprocal_rank, r_p"]),
        ({"kind": "similarity", "layers": [4, {"skp": 1}]}, ["'skp' is no layer; there are identity, linear, mlp"]),
    ],
)
def test_settings_that_do_not_fit_each_other_are_all_told(settings: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        TaskConfig(**settings)
    for fault in faults:
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "task.loss is 'hinge'; expected one of arcface, "),
        ({"miner": "coal"}, "task.miner is 'coal'; expected one of angular, "),
        ({"loss_options": {"temp": 1}}, "task.loss_options has temp; NTXentLoss takes temperature"),
        ({"miner": "angular", "miner_options": {"x": 1}}, "task.miner_options has x; AngularMiner takes angle"),
    ],
)
def test_losses_and_miners_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_task(TaskConfig(kind="similarity", **settings))


@pytest.mark.parametrize(
    ("settings", "table", "message"),
    [
        ({}, labelled(["a", "a"], ["a"]), r"1 classes \(\['a'\]\); classification needs two"),
        ({}, labelled(["a", "b"], ["c", "a", "c"]), r"2 held-out samples have 1 labels that training lacks \('c'\)"),
        ({}, labelled([0.5, 1.5], []), "the labels are float64"),
        ({}, PAIRS, "needs the target label; the samples have pair, role, group"),
        ({"kind": "similarity"}, labelled([1, 1], []), "1 labels or groups; similarity needs two"),
        ({"kind": "similarity"}, labelled([1, 2, 3], []), "no label of the training split has two samples"),
        ({"kind": "similarity"}, labelled([1, 1, 2], [1, 2]), "no label of the validation split has two samples"),
    ],
)
def test_labels_that_do_not_allow_the_task(settings: dict[str, Any], table: Rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_task(TaskConfig(**settings)).prepare(table)


def test_losses_for_labels_are_refused_for_pairs() -> None:
    with pytest.raises(ConfigError, match=r"task\.loss is 'arcface', which needs labels"):
        open_task(TaskConfig(kind="similarity", loss="arcface", layers=[4])).prepare(PAIRS)


def test_a_loss_with_weights_must_be_prepared() -> None:
    task = open_task(TaskConfig(kind="similarity", loss="arcface", layers=[4]))
    with pytest.raises(TrainError, match="call prepare"):
        task.loss(torch.ones(2, 4), {"group": torch.tensor([0, 1])})


def test_head_of_an_embedding() -> None:
    task = open_task(TaskConfig(kind="similarity", pooling="cls", layers=[8, 4]))
    assert task.head(PAIRS) == Head("embedding", pooling="cls", layers=(8, 4))


def test_every_setting_is_documented() -> None:
    assert [name for name, setting in TaskConfig.model_fields.items() if not setting.description] == []
