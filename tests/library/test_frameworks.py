"""Suffixes and stores inside released frameworks: the weights of a plain loop; and the examples, run as they stand."""

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_networks import Items
from test_library import RATE, build, train_live
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
from transformers import Trainer, TrainingArguments

import layer_recycling as lr

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/library").glob("*.py"))
ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

pytestmark = pytest.mark.filterwarnings("default")  # those of the frameworks are not ours


class FrameworkContract:
    """After an epoch in order, the weights are those of a plain loop over live states."""

    name = "bert"

    def train(self, suffix: lr.Suffix, store: lr.StateStore, folder: Path) -> None:
        raise NotImplementedError

    def test_an_epoch_gives_the_weights_of_a_plain_loop(self, tmp_path: Path) -> None:
        case, model, example = build(self.name)
        prefix, suffix = lr.split(model, case.at, example)
        live = copy.deepcopy(lr.split(model, case.at, example)[1])
        store = lr.encode(Items(case.items()), prefix, tmp_path / "states", collate_fn=case.collate, dtype="float32")
        self.train(suffix, store, tmp_path / "run")
        train_live(case, prefix, live, ORDER)
        for key, value in live.state_dict().items():
            torch.testing.assert_close(suffix.state_dict()[key].cpu(), value, rtol=0, atol=1e-6)


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class TestTrainer(FrameworkContract):
    def train(self, suffix: lr.Suffix, store: lr.StateStore, folder: Path) -> None:
        arguments = TrainingArguments(
            str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            save_steps=2,
        )
        optimizer = torch.optim.SGD(suffix.parameters(), lr=RATE)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        options: dict[str, Any] = {"data_collator": store.collate, "train_dataset": store.dataset()}
        trainer = InOrder(suffix, arguments, optimizers=(optimizer, constant), **options)
        trainer.train()
        assert (folder / "checkpoint-2/model.safetensors").is_file()
        trained = {name: item.clone() for name, item in suffix.state_dict().items()}
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        torch.testing.assert_close(dict(suffix.state_dict()), trained, rtol=0, atol=1e-6)


class TestTrainerOfALanguageModel(TestTrainer):
    name = "llama"


def test_accumulated_batches_count_as_they_do_for_the_full_network(tmp_path: Path) -> None:
    case, model, example = build("llama")
    prefix, suffix = lr.split(model, case.at, example)
    data = Items(case.items())
    store = lr.encode(data, prefix, tmp_path / "states", collate_fn=case.collate, dtype="float32")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in suffix.state_dict())
    sides = {"full": (model, data, case.collate), "suffix": (suffix, store.dataset(), store.collate)}
    for name, (network, items, collate) in sides.items():
        arguments = TrainingArguments(
            str(tmp_path / name),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            use_cpu=True,
            save_strategy="no",
        )
        optimizer = torch.optim.SGD([one for one in network.parameters() if one.requires_grad], lr=RATE)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        InOrder(
            network, arguments, data_collator=collate, train_dataset=items, optimizers=(optimizer, constant)
        ).train()
    for name, value in suffix.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6)


class TestLightning(FrameworkContract):
    name = "llama"

    def train(self, suffix: lr.Suffix, store: lr.StateStore, folder: Path) -> None:
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.suffix = suffix

            def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
                return self.suffix(**batch).loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.suffix.parameters(), lr=RATE)

        trainer = lightning.Trainer(
            max_epochs=1, logger=False, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False
        )
        trainer.fit(Module(), DataLoader(store.dataset(), 4, collate_fn=store.collate))


def test_distributed_samplers_divide_the_items(tmp_path: Path) -> None:
    case, model, example = build("tuples")
    prefix, _ = lr.split(model, case.at, example)
    store = lr.encode(Items(case.items()), prefix, tmp_path)
    data, seen = store.dataset(), list[int]()
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=True)
        for batch in DataLoader(data, 3, sampler=sampler, collate_fn=store.collate):
            seen += batch["2"].tolist()
    assert sorted(seen) == sorted(label for *_, label in case.items())


@pytest.mark.slow
@pytest.mark.parametrize("script", [path for path in EXAMPLES if path.stem != "packaged"], ids=lambda path: path.stem)
def test_an_example_runs_as_it_stands(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend")
    if "lightning" in script.stem:
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--samples", "64", "--epochs", "1"])
    runpy.run_path(str(script), run_name="__main__")
    assert 0 <= float(capsys.readouterr().out.rpartition("accuracy ")[2].split()[0]) <= 1
