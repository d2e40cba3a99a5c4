"""The same training by live states and from a store, for one network of each kind that users bring."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, default_collate
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

N = 10


class Items(Dataset):
    """A data set of ready items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Gated(nn.Module):
    """Takes two tensors: values and a gate for each, which every layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh() * gate
        return self.head(x)


def pad_texts(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad ids with 9 under a mask, and labels with -100, as data collators of transformers do."""
    longest = max(len(item["input_ids"]) for item in items)
    batch: dict[str, list[Tensor]] = {}
    for item in items:
        ids = torch.as_tensor(item["input_ids"])
        labels, room = torch.as_tensor(item["labels"]), longest - len(ids)
        batch.setdefault("input_ids", []).append(functional.pad(ids, (0, room), value=9))
        batch.setdefault("attention_mask", []).append(functional.pad(torch.ones_like(ids), (0, room)))
        batch.setdefault("labels", []).append(functional.pad(labels, (0, room), value=-100) if labels.dim() else labels)
    return {name: torch.stack(tensors) for name, tensors in batch.items()}


def _texts(of_tokens: bool) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(10, 50, (4 + i % 5,), generator=draw).tolist() for i in range(N)]
    return [{"input_ids": ids, "labels": ids if of_tokens else i % 3} for i, ids in enumerate(texts)]


@dataclass
class Case:
    """A network, a data set for it, and how both are used without this library."""

    make: Callable[[], nn.Module]
    items: Callable[[], list[Any]]
    collate: Callable[[list[Any]], Any] | None
    at: float | str

    def live(self, items: list[Any]) -> Any:
        """Return the batch with which the network is called, and its labels if they are apart."""
        return (self.collate or default_collate)(items)


def resnet_items() -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 32, 32, generator=draw), i % 3) for i in range(N)]


def gated_items() -> list[tuple[Tensor, Tensor, int]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(6, generator=draw), torch.rand(6, generator=draw), i % 3) for i in range(N)]


SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(**SHAPE, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


CASES = {
    "resnet": Case(lambda: tv.resnet18(num_classes=3), resnet_items, None, "layer3"),
    "bert": Case(bert, lambda: _texts(False), pad_texts, 0.5),
    "llama": Case(
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False)), lambda: _texts(True), pad_texts, 0.5
    ),
    "tuples": Case(Gated, gated_items, None, "layers.2"),
}


def loss_of(output: Any, labels: Tensor | None) -> Tensor:
    """Return the loss that the network gives, or that of its logits."""
    return output.loss if hasattr(output, "loss") else functional.cross_entropy(output, labels)
