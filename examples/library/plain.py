"""Digits in a plain PyTorch loop: python examples/library/plain.py"""

import argparse

import torch
from packaged import Digits, efficientnet
from torch.nn import functional
from torch.utils.data import DataLoader

import layer_recycling as lr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=2000)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--store", default="states/digits")
options = parser.parse_args()

model = efficientnet()
train, test = Digits(0, options.samples), Digits(4000, 4000 + options.samples // 4)
example, _ = next(iter(DataLoader(train, 4)))
prefix, suffix = lr.split(model, at=0.75, example=example)
store = lr.encode(train, prefix, options.store)
held_out = lr.encode(test, prefix, options.store, split="test")

optimizer = torch.optim.AdamW(suffix.parameters(), lr=1e-3)
loader = DataLoader(
    store.dataset(), 64, shuffle=True, collate_fn=store.collate
)  # store.loader(64, shuffle=True) is faster
for _ in range(options.epochs):
    suffix.train()
    for batch in loader:
        functional.cross_entropy(suffix(batch["state"]), batch["1"]).backward()
        optimizer.step()
        optimizer.zero_grad()

suffix.eval()
with torch.no_grad():
    right = sum(int((suffix(batch["state"]).argmax(1) == batch["1"]).sum()) for batch in held_out.loader(64))
print(f"accuracy {right / len(held_out):.3f}")
lr.merge(model, suffix)
