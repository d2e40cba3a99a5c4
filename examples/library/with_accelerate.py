"""Questions with accelerate, in any number of processes: accelerate launch examples/library/with_accelerate.py"""

import argparse

import torch
from accelerate import Accelerator
from packaged import Tokenize, minilm, questions
from torch.utils.data import DataLoader

import layer_recycling as lr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=400)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--store", default="states/questions")
options = parser.parse_args()

rows, categories = questions()
tokenize, model = Tokenize(), minilm(categories)
prefix, suffix = lr.split(model, at=0.5, example=tokenize(rows[:4]))
accelerator = Accelerator()
with accelerator.main_process_first():  # the others find everything encoded
    store = lr.encode(rows[: options.samples], prefix, options.store, collate_fn=tokenize)
    held_out = lr.encode(rows[400:], prefix, options.store, collate_fn=tokenize, split="test")

optimizer = torch.optim.AdamW(suffix.parameters(), lr=5e-4)
loader = DataLoader(store.dataset(), 32, shuffle=True, collate_fn=store.collate)
suffix, optimizer, loader = accelerator.prepare(suffix, optimizer, loader)
for _ in range(options.epochs):
    suffix.train()
    for batch in loader:
        accelerator.backward(suffix(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

suffix.eval()
test = accelerator.prepare(DataLoader(held_out.dataset(), 32, collate_fn=held_out.collate))
right = torch.zeros(2, device=accelerator.device)
with torch.no_grad():
    for batch in test:
        logits, labels = accelerator.gather_for_metrics((suffix(**batch).logits, batch["labels"]))
        right += torch.stack([(logits.argmax(1) == labels).sum(), torch.tensor(len(labels), device=right.device)])
accelerator.print(f"accuracy {float(right[0] / right[1]):.3f}")
