"""Numbers, one or several per sample: squared, absolute or Huber error; scores in the user's unit."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, TrainError
from pipeline.tasks.base import Column, Head, Kind, PredictionContext, Table, Task, column
from pipeline.tasks.config import LOWER_IS_BETTER, REGRESSION_LOSSES, SCORES, TaskConfig
from pipeline.tasks.review import Mistake, points, review, worst
from pipeline.tasks.scores import ALONE, Metrics, read_tensor

# N row of the table, B batch, K number to regress

_LOSSES: dict[str, Any] = dict(zip(REGRESSION_LOSSES, (nn.MSELoss, nn.L1Loss, nn.HuberLoss), strict=True))


class Regression(Task):
    """The model learns standardised numbers: less the mean of the training split, over its standard deviation.

    Scores and predictions are in the user's unit; an exported model gives standardised numbers, and the `legend.json`
    beside it their mean and standard deviation.
    """

    name = "regression"

    def __init__(self, config: TaskConfig) -> None:
        self.layers = config.layers
        self.monitor = config.monitor or SCORES[self.name][0]
        try:
            self._loss: nn.Module = _LOSSES[config.loss](**config.loss_options)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"task.loss_options is {config.loss_options}; {_LOSSES[config.loss].__name__} does not take it: {error}"
            ) from error
        self._scale: np.ndarray | None = None

    def head(self, table: Table) -> Head:
        return Head("classes", size=self._numbers(table).shape[1], layers=self.layers, problem="regression")

    def units_of(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the training split, (K,) float64 each; raises DataError if one is 0."""
        training_NK = self._numbers(table)[table.split == "train"]
        if not len(training_NK):
            raise DataError("the training split has no sample; regression needs two or more")
        mean, std = training_NK.mean(0), training_NK.std(0)
        if (flat := np.flatnonzero(training_NK.min(0) == training_NK.max(0))).size:
            raise DataError(
                f"the number {training_NK[0, flat[0]]} (column {flat[0]}) is the same in all {len(training_NK)} "
                "training samples; regression needs numbers that differ"
            )
        return mean, std

    def _numbers(self, table: Table) -> np.ndarray:
        """Return the numbers of every row, (N, K) float64; texts are read as numbers."""
        labels = column(table, "label", self.name).tolist()
        try:
            numbers = np.array(labels, np.float64).reshape(len(labels), -1)
        except ValueError as error:
            wrong = next((row for row, label in enumerate(labels) if not _is_numbers(label)), None)
            shown = f"that of {_name(table, wrong)} is {labels[wrong]!r}" if wrong is not None else f"{error}"
            raise DataError(
                f"the labels are no numbers, or lists of different lengths ({shown}); regression needs one number per "
                "sample, or equally many of each"
            ) from error
        if not numbers.shape[1]:
            raise DataError("the labels are empty lists; regression needs numbers")
        if (bad := np.flatnonzero(~np.isfinite(numbers).all(1))).size:
            raise DataError(
                f"the labels of {bad.size} samples are not finite (the first is that of {_name(table, int(bad[0]))}); "
                "correct them, or leave these samples out"
            )
        return numbers

    def prepare(self, table: Table) -> dict[str, np.ndarray]:
        mean, self._scale = self.units_of(table)
        return {"label": ((self._numbers(table) - mean) / self._scale).astype(np.float32)}

    def loss(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self._loss(read_numbers(output, targets["label"]), targets["label"])
        return loss

    def linear_target(self, targets: Mapping[str, Tensor]) -> Tensor:
        return targets["label"]

    def legend(self, table: Table) -> list[Any]:
        """Return mean and standard deviation of each number."""
        mean, std = self.units_of(table)
        return [{"mean": float(one), "std": float(other)} for one, other in zip(mean, std, strict=True)]

    def columns(self, legend: Sequence[Any]) -> Mapping[str, Kind]:
        return {"value": float if len(legend) == 1 else [float]}

    def predictions(self, output: Any, context: PredictionContext, legend: Sequence[Any]) -> Mapping[str, Column]:
        standard_BK = read_tensor(output).double().cpu().numpy().reshape(-1, len(legend))
        mean, std = (np.array([one[name] for one in legend]) for name in ("mean", "std"))
        values_BK = standard_BK * std + mean
        return {"value": values_BK[:, 0] if len(legend) == 1 else values_BK}

    def metrics(self) -> Metrics:
        if self._scale is None:
            raise TrainError("the unit of the numbers is not known; call prepare(table) before metrics()")
        return RegressionScores(self._scale)

    def review(self, table: Table) -> Metrics:
        return RegressionReview(*self.units_of(table))


class RegressionScores(Metrics):
    """`rmse`, `mae` in the user's unit, `r2`, `pearson`, `spearman` (NaN for constants); means over the numbers."""

    def __init__(self, scale_K: np.ndarray) -> None:
        """Score standardised numbers; `scale_K` (K,) is the standard deviation of each in the user's unit."""
        super().__init__(SCORES["regression"])
        self._scale, self._samples = torch.from_numpy(scale_K), 0
        import torchmetrics as library  # noqa: PLC0415  (slow to import)

        count = len(scale_K)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on memory: two numbers per sample
            self._scores: dict[str, Any] = {
                "rmse": library.MeanSquaredError(squared=False, num_outputs=count, **ALONE),
                "mae": library.MeanAbsoluteError(num_outputs=count, **ALONE),
                "r2": library.R2Score(**ALONE),
                "pearson": library.PearsonCorrCoef(num_outputs=count, **ALONE),
                "spearman": library.SpearmanCorrCoef(num_outputs=count, **ALONE),
            }

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        expected_BK = targets["label"]
        found_BK = read_numbers(output, expected_BK)
        for score in self._scores.values():
            score.update(found_BK.squeeze(1), expected_BK.squeeze(1))
        self._samples += len(expected_BK)

    def result(self) -> dict[str, float]:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on constants, whose NaN says it
            errors = {
                name: self._scores[name].compute() * self._scale for name in LOWER_IS_BETTER & self._scores.keys()
            }
            alike = {name: score.compute() for name, score in self._scores.items() if self._samples > 1}
        found = {name: float(value.mean()) for name, value in (alike | errors).items()}
        return {name: found.get(name, float("nan")) for name in self._scores}  # one sample has no correlation


class RegressionReview(Metrics):
    """Predicted numbers against the expected ones, in the user's unit, and the samples furthest from theirs."""

    def __init__(self, mean_K: np.ndarray, scale_K: np.ndarray) -> None:
        """Read standardised numbers: less `mean_K` (K,), over `scale_K` (K,)."""
        super().__init__(())
        self._mean_K, self._scale_K = mean_K, scale_K
        self._seen: list[tuple[Tensor, ...]] = []

    def add(self, output: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._seen.append((targets["row"], targets["label"], read_numbers(output, targets["label"])))

    def result(self) -> dict[str, Any]:
        rows, *both = (torch.cat(part).numpy() for part in zip(*self._seen, strict=True))
        off_N = np.abs(both[1] - both[0]).mean(axis=1)
        right_NK, found_NK = (one * self._scale_K + self._mean_K for one in both)

        def shown(numbers_K: np.ndarray) -> str:
            return ", ".join(f"{number:.4g}" for number in numbers_K)

        mistakes = [
            Mistake(int(rows[i]), shown(right_NK[i]), shown(found_NK[i]), float(off_N[i]))
            for i in worst(off_N, off_N > 0)
        ]
        return review(
            len(rows),
            None,
            mistakes,
            "error in standard deviations of the training labels",
            points=points(("expected", "predicted"), right_NK.ravel(), found_NK.ravel()),
        )


def _is_numbers(label: object) -> bool:
    try:
        np.array(label, np.float64)
    except ValueError:
        return False
    return True


def _name(table: Table, row: int) -> str:
    """Return where a row comes from, if the table says it."""
    sources: Sequence[str] | None = getattr(table, "source", None)
    return f"row {row} of the sample table" if sources is None else sources[row]


def read_numbers(output: Any, expected_BK: Tensor) -> Tensor:
    """Return the predicted numbers (B, K) float32, K axis optional if K = 1; raises TrainError for other shapes."""
    numbers = read_tensor(output).float()
    numbers = numbers.reshape(len(numbers), -1)
    if numbers.shape != expected_BK.shape:
        task = f"regression of {expected_BK.shape[1]} numbers per sample"
        raise TrainError(f"the model returns {list(numbers.shape)}; {task} needs {list(expected_BK.shape)}")
    return numbers
