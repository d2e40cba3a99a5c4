"""Digits with Lightning: python examples/library/with_lightning.py"""

import argparse
from typing import Any

import lightning
import torch
from packaged import Digits, efficientnet
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

import layer_recycling as lr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=2000)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--store", default="states/digits")
options = parser.parse_args()


class Classifier(lightning.LightningModule):
    """Trains a suffix on labelled states."""

    def __init__(self, suffix: lr.Suffix) -> None:
        super().__init__()
        self.suffix = suffix

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return functional.cross_entropy(self.suffix(**batch), batch["1"])

    def validation_step(self, batch: dict[str, Any]) -> None:
        right = (self.suffix(**batch).argmax(1) == batch["1"]).float().mean()
        self.log("accuracy", right, batch_size=len(batch["1"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.suffix.parameters(), lr=1e-3)


model = efficientnet()
train, test = Digits(0, options.samples), Digits(4000, 4000 + options.samples // 4)
example, _ = next(iter(DataLoader(train, 4)))
prefix, suffix = lr.split(model, at=0.75, example=example)
store = lr.encode(train, prefix, options.store)
held_out = lr.encode(test, prefix, options.store, split="test")

trainer = lightning.Trainer(max_epochs=options.epochs, logger=False, default_root_dir=f"{options.store}-run")
trainer.fit(
    Classifier(suffix),
    DataLoader(store.dataset(), 64, shuffle=True, collate_fn=store.collate),
    DataLoader(held_out.dataset(), 64, collate_fn=held_out.collate),
)
print(f"accuracy {float(trainer.callback_metrics['accuracy']):.3f}")
lr.merge(model, suffix)
