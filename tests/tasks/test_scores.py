"""The scores that are counted here are those of torchmetrics."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from pipeline.tasks.classification import SingleLabelScores


@pytest.mark.parametrize(("classes", "present"), [(2, 2), (5, 5), (9, 4)])
def test_single_label_scores_are_those_of_torchmetrics(classes: int, present: int) -> None:
    """Over several batches, also where no sample has some classes, or none is given them."""
    generator = torch.Generator().manual_seed(classes)
    ours = SingleLabelScores(["accuracy", "macro_f1"])
    accuracy, macro_f1 = MulticlassAccuracy(classes, average="micro"), MulticlassF1Score(classes, average="macro")
    for size in (7, 1, 40):
        output = torch.randn(size, classes, generator=generator)
        output[:, -1] -= 100.0 * (classes > present)
        label = torch.randint(present, (size,), generator=generator)
        ours.update(output, {"label": label})
        accuracy.update(output, label)
        macro_f1.update(output, label)
    expected = {"accuracy": float(accuracy.compute()), "macro_f1": float(macro_f1.compute())}
    assert ours.compute() == pytest.approx(expected, rel=1e-6)
