"""The tasks by the contract of all, and what each of them does with bad labels and settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from task_contract import Rows, TaskContract, labelled, paired
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, TrainError
from pipeline.tasks import Head, Task, TaskConfig, open_task, read_tensor

LABELS = labelled([3, 1, 3, 1, 1, 3, 2, 2], [1, 2, 3, 2])
PAIRS = paired(6, 3)


class TestClassification(TaskContract):
    settings: Mapping[str, Any] = {}
    table = LABELS

    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
        return 9 * nn.functional.one_hot(targets["label"], 3).float()

    def check_predictions(self, said: Mapping[str, Any], rows: np.ndarray) -> None:
        assert said["label"].tolist() == self.table.targets["label"][rows].tolist()

    def test_one_answer_for_all_has_a_score(self) -> None:
        expected = 0.25 if open_task(TaskConfig(**self.settings)).monitor == "accuracy" else None
        assert open_task(TaskConfig(**self.settings)).chance(LABELS) == expected  # 3 is most frequent in training


class TestClassificationWithAClassThatValidationLacks(TestClassification):
    settings: Mapping[str, Any] = {"monitor": "macro_f1"}
    table = labelled([3, 1, 3, 1, 1, 3, 2, 2], [1, 3, 3])


class TestSmoothedClassification(TestClassification):
    settings: Mapping[str, Any] = {"label_smoothing": 0.1, "monitor": "macro_f1"}


class TestBalancedClassification(TestClassification):
    settings: Mapping[str, Any] = {"class_weights": "balanced"}

    def test_rare_classes_count_as_much_as_frequent_ones(self) -> None:
        task = open_task(TaskConfig(**self.settings))
        task.prepare(labelled(["a"] * 9 + ["b"], []))
        logits = torch.zeros(10, 2, requires_grad=True)
        task.loss(logits, {"label": torch.tensor([0] * 9 + [1])}).backward()
        assert logits.grad is not None
        assert logits.grad[:9].sum(0).tolist() == pytest.approx((-logits.grad[9]).tolist())


class TestMultiLabel(TaskContract):
    """One sample has no label, and one label no sample of validation."""

    settings: Mapping[str, Any] = {"kind": "multi-label"}
    table = labelled([["a", "c"], [], ["b"], ["a"], ["c", "b"], ["a", "d"]], [["a"], ["b", "a"], [], ["c"]])

    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
        return 18 * (targets["label"].float() - 0.5)

    def check_predictions(self, said: Mapping[str, Any], rows: np.ndarray) -> None:
        assert said["labels"] == [sorted(labels) for labels in self.table.targets["label"][rows]]
        assert said["probabilities"].shape == (len(rows), 4)

    def test_several_hot(self, task: Task) -> None:
        assert task.prepare(self.table)["label"][:3].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


class TestSmoothedMultiLabel(TestMultiLabel):
    settings: Mapping[str, Any] = {"kind": "multi-label", "label_smoothing": 0.1, "monitor": "macro_f1"}


class TestBalancedMultiLabel(TestMultiLabel):
    settings: Mapping[str, Any] = {"kind": "multi-label", "class_weights": "balanced"}

    def test_yes_counts_as_much_as_no(self) -> None:
        task = open_task(TaskConfig(**self.settings))
        hot = torch.from_numpy(task.prepare(labelled([["a"], [], [], ["b", "a"], []], []))["label"])
        logits = torch.zeros(5, 2, requires_grad=True)
        task.loss(logits, {"label": hot}).backward()
        assert logits.grad is not None
        assert logits.grad.sum(0).tolist() == pytest.approx([0, 0], abs=1e-7)


class TestRegression(TaskContract):
    settings: Mapping[str, Any] = {"kind": "regression"}
    table = labelled([1e6, 1e6 + 1, 1e6 + 5, 1e6 - 3], [1e6 + 2, 1e6 - 2, 1e6 + 9])

    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
        return targets["label"].clone()

    def check_predictions(self, said: Mapping[str, Any], rows: np.ndarray) -> None:
        expected = np.array(self.table.targets["label"][rows].tolist())
        assert said["value"] == pytest.approx(expected, rel=1e-6)

    def test_scores_are_in_the_unit_of_the_user(self, task: Task) -> None:
        targets = self.batch(task, np.array([4, 5, 6]))
        metrics = task.metrics()
        metrics.update(targets["label"] + 2 / torch.from_numpy(self.spread()), targets)
        scores = metrics.compute()
        assert scores["mae"] == pytest.approx(2, rel=1e-5)
        assert scores["rmse"] == pytest.approx(2, rel=1e-5)
        assert scores["pearson"] == pytest.approx(1)

    def spread(self) -> np.ndarray:
        labels = np.array(self.table.targets["label"].tolist()).reshape(len(self.table.split), -1)
        return labels[self.table.split == "train"].std(0)

    def test_a_single_or_a_constant_sample_has_an_error_and_no_correlation(self, task: Task) -> None:
        for rows in ([4], [4, 4]):
            targets = self.batch(task, np.array(rows))
            metrics = task.metrics()
            metrics.update(torch.zeros_like(targets["label"]), targets)
            scores = metrics.compute()
            assert scores["mae"] > 0
            assert np.isnan(scores["pearson"])

    def test_another_number_of_outputs_is_told(self, task: Task) -> None:
        targets = self.batch(task, np.array([0, 1]))
        with pytest.raises(TrainError, match=r"the model returns \[2, 7\]; regression of . numbers per sample"):
            task.loss(torch.zeros(2, 7), targets)


class TestRegressionOfSeveral(TestRegression):
    settings: Mapping[str, Any] = {
        "kind": "regression",
        "loss": "huber",
        "loss_options": {"delta": 0.5},
        "monitor": "r2",
    }
    table = labelled([[1, 10.5], [2, 20], [3, 35], [5, 1]], [[1, 30], [2, 2], [2.5, 20]])


class TestRegressionByAbsoluteError(TestRegression):
    settings: Mapping[str, Any] = {"kind": "regression", "loss": "l1", "monitor": "mae"}
    table = labelled([3, 1, 4, 1], [5, 9, 2])


class SimilarityContract(TaskContract):
    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
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
        (
            {"kind": "ranking"},
            ["kind is 'ranking'; expected one of classification, multi-label, regression, similarity"],
        ),
        ({"kind": "regression", "loss": "hinge"}, ["loss is 'hinge'; regression has mse, l1, huber"]),
        ({"kind": "multi-label", "monitor": "accuracy"}, ["multi-label has average_precision, micro_f1, macro_f1"]),
        ({"kind": "regression", "class_weights": "balanced"}, ["class_weights is 'balanced', which kind regression"]),
        ({"loss": "circle", "memory": 4}, ["loss is 'circle', which kind classification does not use", "memory is"]),
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
        ({"kind": "regression", "loss_options": {"delta": 1}}, "MSELoss does not take it"),
    ],
)
def test_losses_and_miners_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_task(TaskConfig(**{"kind": "similarity"} | settings))


@pytest.mark.parametrize(
    ("settings", "table", "message"),
    [
        ({}, labelled(["a", "a"], ["a"]), r"1 classes \(\['a'\]\); classification needs two"),
        ({}, labelled(["a", "b"], ["c", "a", "c"]), r"2 held-out samples have 1 labels that training lacks \('c'\)"),
        ({}, labelled([0.5, 1.5], []), "the labels are float64"),
        ({}, labelled([["a"], ["b"]], []), "the labels are lists; .* set task.kind: multi-label"),
        (
            {"kind": "multi-label"},
            labelled(["a", "b"], []),
            "the labels are <U1, one per sample; .* set data.delimiter",
        ),
        ({"kind": "multi-label"}, labelled([[], ["a"]], [["a"]]), r"1 labels \(\['a'\]\); multi-label needs two"),
        (
            {"kind": "multi-label"},
            labelled([["a", "d"]], [["b"], ["c", "b"]]),
            r"3 held-out .* 2 labels .* \('b', 'c'\)",
        ),
        ({"kind": "multi-label"}, labelled([["a"], [1]], []), "the labels are int, str; multi-label needs names, or"),
        ({"kind": "multi-label"}, labelled([[0.5], [1.5]], []), "the labels are float; multi-label"),
        ({"kind": "regression"}, labelled(["a", "b"], []), "the labels are no numbers"),
        ({"kind": "regression"}, labelled(["1", "2", "1,5"], []), "row 2 of the sample table is '1,5'"),
        ({"kind": "regression"}, labelled([[1, 2], [3]], []), "lists of different lengths"),
        ({"kind": "regression"}, labelled([[], []], []), "regression needs numbers"),
        (
            {"kind": "regression"},
            labelled([0.5, 1], [float("nan")]),
            r"1 samples are not finite \(the first is that of row",
        ),
        ({"kind": "regression"}, labelled([2, 2], [1]), r"the number 2\.0 \(column 0\) is the same in all 2 training"),
        ({"kind": "regression"}, labelled([], [1]), "the training split has no sample"),
        ({}, PAIRS, "needs the target label; the samples have pair, role, group"),
        ({"kind": "similarity"}, labelled([1, 1], []), "1 labels or groups; similarity needs two"),
        ({"kind": "similarity"}, labelled([1, 2, 3], []), "no label of the train split has two samples"),
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


def test_numbers_in_texts_are_regressed() -> None:
    task = open_task(TaskConfig(kind="regression"))
    made = task.prepare(labelled(["1.50", "3.5", "1e0"], ["2"]))
    assert np.allclose(made["label"].ravel() * np.std([1.5, 3.5, 1]) + 2, [1.5, 3.5, 1, 2])
