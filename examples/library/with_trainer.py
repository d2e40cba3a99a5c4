"""Questions with the Trainer of Hugging Face: python examples/library/with_trainer.py"""

import argparse

from packaged import Tokenize, minilm, questions
from transformers import Trainer, TrainingArguments

import layer_recycling as lr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=400)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--store", default="states/questions")
options = parser.parse_args()

rows, categories = questions()
tokenize, model = Tokenize(), minilm(categories)
prefix, suffix = lr.split(model, at=0.5, example=tokenize(rows[:4]))
store = lr.encode(rows[: options.samples], prefix, options.store, collate_fn=tokenize)
held_out = lr.encode(rows[400:], prefix, options.store, collate_fn=tokenize, split="test")

trainer = Trainer(
    suffix,
    TrainingArguments(
        f"{options.store}-run",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=5e-4,
        remove_unused_columns=False,  # the Trainer looks for columns of the whole network, and would drop the state
        label_names=["labels"],
        report_to="none",
    ),
    data_collator=store.collate,
    train_dataset=store.dataset(),
    eval_dataset=held_out.dataset(),
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
)
trainer.train()
print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
lr.merge(model, trainer.model)
