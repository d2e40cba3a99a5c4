"""What every task promises; a subclass in a test file is one task with its settings."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import ConvNet
from torch import Tensor, nn

from pipeline.data import DataConfig, Row, Source, open_source
from pipeline.project import Project
from pipeline.runs.predictions import Predictions
from pipeline.tasks import Head, PredictionContext, Task, TaskConfig, open_task
from pipeline.tasks.config import LOWER_IS_BETTER
from pipeline.tasks.heads import last_width
from pipeline.train.order import batches
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.predict import predict_project
from pipeline.workflows.train import train_project

CUT = 0.5


@dataclass
class Rows:
    """A sample table as tasks see it."""

    split: np.ndarray
    targets: dict[str, np.ndarray] = field(default_factory=dict)


def labelled(train: list[Any], validation: list[Any]) -> Rows:
    split = np.array(["train"] * len(train) + ["validation"] * len(validation))
    labels = [*train, *validation]
    lists = any(isinstance(label, list) for label in labels)
    return Rows(split, {"label": np.fromiter(labels, object, len(labels)) if lists else np.array(labels)})


def paired(train: int, validation: int) -> Rows:
    count = train + validation
    split = np.repeat(np.where(np.arange(count) < train, "train", "validation"), 2)
    groups = np.array([f"g{i}" for i in range(count)])
    roles = np.array(["anchor", "positive"] * count)
    return Rows(split, {"pair": np.repeat(np.arange(count), 2), "role": roles, "group": np.repeat(groups, 2)})


class Described(Source):
    """Small arrays with the splits and targets of `data.options`."""

    def __init__(self, config: DataConfig) -> None:
        self.split, self.targets = config.options["split"], config.options["targets"]

    def __len__(self) -> int:
        return len(self.split)

    def row(self, i: int) -> Row:
        return Row(f"row {i}", self.split[i], {name: values[i] for name, values in self.targets.items()})

    def content(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).random((3, 8, 8), np.float32)


def network(head: Head) -> nn.Module:
    """A network that ends in `head`; an embedding without a width of its own has five numbers."""
    return ConvNet(head.size or last_width(head.layers) or 5)


class TaskContract:
    """A subclass gives the section `task:`, a table, and an output that is right for its rows.

    Where a model returns something else than one tensor, or the samples are no arrays, it overrides `wrapped` or
    `sections` too.
    """

    settings: Mapping[str, Any]
    table: Rows

    def right(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the output (B, ...) of a model that is never wrong."""
        raise NotImplementedError

    def wrapped(self, output: Tensor) -> Any:
        """Return `output` as the model returns it."""
        return output

    def sections(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Return the sections of params.yaml that a run on this table needs beside `task:`.

        Data may be written to `folder`, from where paths start; there is a directory of a tiny text network, `bert`.
        """
        targets = {name: values.tolist() for name, values in self.table.targets.items()}
        return {
            "data": {
                "source": f"{__name__}:Described",
                "options": {"split": self.table.split.tolist(), "targets": targets},
            },
            "model": {"backbone": f"{__name__}:network"},
            "preprocess": {"kind": "array"},
        }

    @pytest.fixture
    def task(self) -> Task:
        return open_task(TaskConfig(**self.settings))

    def batch(self, task: Task, rows: np.ndarray) -> dict[str, Tensor]:
        return {name: torch.from_numpy(values[rows]) for name, values in task.prepare(self.table).items()}

    def training_batch(self, task: Task) -> dict[str, Tensor]:
        return self.batch(task, batches(task.units(self.table, "train"), 100, seed=0, epoch=0, shuffle=False)[0])

    def test_asks_for_a_head(self, task: Task) -> None:
        head = task.head(self.table)
        assert head == task.head(self.table)
        assert (head.size is None) == (head.kind in ("embedding", "span"))

    def test_targets_are_numbers_row_by_row(self, task: Task) -> None:
        before = copy.deepcopy(self.table)
        prepared, again = task.prepare(self.table), task.prepare(self.table)
        rows = np.arange(len(self.table.split))
        assert all(len(values) == len(rows) and values[rows].dtype.kind in "biuf" for values in prepared.values())
        assert all(np.array_equal(again[name][rows], values[rows]) for name, values in prepared.items())
        assert before.targets.keys() == self.table.targets.keys()
        assert all(before.targets[name].tolist() == values.tolist() for name, values in self.table.targets.items())

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
        targets = self.training_batch(task)
        torch.manual_seed(0)
        output = torch.randn(self.right(targets).shape, requires_grad=True)
        extra = [] if task.loss_module is None else list(task.loss_module.parameters())
        optimizer = torch.optim.SGD([output, *extra], lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = task.loss(self.wrapped(output), targets)
            assert loss.shape == ()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert np.isfinite(losses).all()

    def test_half_precision_outputs_are_fine(self, task: Task) -> None:
        targets = self.training_batch(task)
        loss = task.loss(self.wrapped(self.right(targets).to(torch.bfloat16)), targets)
        assert loss.dtype == torch.float32
        assert loss.isfinite()

    def test_scores_of_a_model_that_is_never_wrong(self, task: Task) -> None:
        task.prepare(self.table)
        for wrong in (True, False):
            metrics = task.metrics()
            for rows in batches(task.units(self.table, "validation"), 2, seed=0, epoch=0, shuffle=False):
                targets = self.batch(task, rows)
                output = self.right(targets).float()
                draw = torch.Generator().manual_seed(len(output))
                metrics.update(self.wrapped(torch.randn(output.shape, generator=draw) if wrong else output), targets)
            scores = metrics.compute()
            assert task.monitor in scores
            assert all(type(score) is float for score in scores.values())
            best = {name: 0.0 if name in LOWER_IS_BETTER else 1.0 for name in scores}
            assert (scores == pytest.approx(best, abs=1e-5)) != wrong

    def test_the_review_names_the_samples_that_are_wrong(self, task: Task) -> None:
        task.prepare(self.table)
        reviews = {}
        for wrong in (True, False):
            collector = task.review(self.table)
            assert collector is not None
            for rows in batches(task.units(self.table, "validation"), 2, seed=0, epoch=0, shuffle=False):
                targets = self.batch(task, rows)
                output = self.right(targets).float()
                draw = torch.Generator().manual_seed(len(output))
                shown = 3 * torch.randn(output.shape, generator=draw) if wrong else output
                collector.update(self.wrapped(shown), targets | {"row": torch.from_numpy(np.asarray(rows))})
            reviews[wrong] = json.loads(json.dumps(collector.compute()))
        found, right = reviews[True]["mistakes"], reviews[False]["mistakes"]
        assert found
        assert all(self.table.split[mistake["row"]] == "validation" for mistake in found)
        assert all(mistake["expected"] and mistake["predicted"] for mistake in found)
        assert [mistake["severity"] for mistake in found] == sorted((one["severity"] for one in found), reverse=True)
        assert all(mistake["severity"] < 1e-5 for mistake in right)
        assert not reviews[False]["wrong"]

    def test_scores_of_nothing_are_not_numbers(self, task: Task) -> None:
        task.prepare(self.table)
        assert np.isnan(task.metrics().compute()[task.monitor])

    def test_predictions_have_their_columns(self, task: Task) -> None:
        rows = np.flatnonzero(self.table.split == "train")[:3]
        targets = self.batch(task, rows)
        legend = json.loads(json.dumps(task.legend(self.table)))  # as a run keeps it
        sources = [{name: values[row] for name, values in self.table.targets.items()} for row in rows.tolist()]
        said = task.predictions(
            self.wrapped(self.right(targets).float()), PredictionContext(targets, lambda: sources), legend
        )
        assert said.keys() == task.columns(legend).keys()
        assert all(len(values) == len(rows) for values in said.values())
        predictions = Predictions(task.columns(legend))
        predictions.add(rows, said)
        assert all(None not in one.values() for one in predictions.take(rows).to_pylist())
        self.check_predictions(said, rows)

    def check_predictions(self, said: Mapping[str, Any], rows: np.ndarray) -> None:
        """Check what is predicted for `rows` by a model that is never wrong."""

    def test_a_run_from_data_to_a_score_is_the_same_every_time(
        self, task: Task, tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        small = {"encode": {"cuts": [CUT], "workers": 0}, "train": {"epochs": 2, "batch_size": 4}}
        settings = {"task": dict(self.settings)} | small | self.sections(tmp_path)
        Path("params.yaml").write_text(yaml.safe_dump(settings))
        project = Project.load(Path("params.yaml"))
        assert encode_project(project)
        runs = [train_project(project, str(CUT)) for _ in range(2)]
        losses = [[row["train/loss"] for row in run.history] for run in runs]
        assert losses[0] == losses[1]
        assert np.isfinite([*losses[0], runs[0].value, runs[0].initial]).all()
        assert runs[0].metric == task.monitor
        values = [row[f"validation/{task.monitor}"] for row in runs[0].history]
        assert runs[0].value == (max(values) if task.higher_is_better else min(values))
        assert predict_project(project, [runs[0].name], None, Path("predicted.jsonl"))
        said = [json.loads(line) for line in Path("predicted.jsonl").read_text().splitlines()]
        assert len(said) == len(open_source(project.data))
        assert all(set(task.columns(runs[0].legend)) <= set(line) for line in said)
        assert export_run(project, runs[0].name, Path("exported")).merged < 1e-5
        legend = Path("exported/legend.json")
        assert (json.loads(legend.read_text()) if legend.exists() else []) == runs[0].legend
