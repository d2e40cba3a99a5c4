"""A tiny project on real files: small images in a folder per class, a small convolutional network of the user's own."""

import io
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from pipeline.data import DataConfig, Row, Source
from pipeline.encode.encoder import Encoder
from pipeline.errors import BadSampleError
from pipeline.tasks import Head

TESTS = Path(__file__).parent
FOLDERS = sorted({file.parent for file in TESTS.rglob("test_*.py")} - {TESTS})
IMPORTS = os.pathsep.join(map(str, [TESTS.parent, TESTS, *FOLDERS]))
"""For PYTHONPATH: this checkout is tested, even where another one is installed; modules of tests can be named."""
CLASSES = ("circle", "square", "stripe")
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "good", "bad"]


class ConvNet(nn.Module):
    """Four blocks with batch norm and in-place ReLU, and a head with dropout."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = [3, 8, 8, 12, 12]
        self.blocks = nn.Sequential(*(block(i, o) for i, o in pairwise(widths)))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.blocks(x).mean((2, 3))))


def block(ins: int, outs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU(inplace=True))


def conv_net(head: Head) -> nn.Module:
    return ConvNet(head.size or 0)


class Overflowing(ConvNet):
    """Its first block gives values beyond float16's range."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x) * 1e6
        for later in self.blocks[1:]:
            x = later(x)
        return self.classifier(x.mean((2, 3)))


def overflowing(head: Head) -> nn.Module:
    return Overflowing(head.size or 0)


class Logarithmic(ConvNet):
    """Gives NaN for a negative input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.log(x))


def logarithmic(head: Head) -> nn.Module:
    return Logarithmic(head.size or 0)


class Leaky(nn.Module):
    """A text network that ignores its mask: every token sees the mean of all, padding included."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.classifier = nn.Linear(8, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden - hidden.mean(1, keepdim=True)).tanh()
        return self.classifier(hidden.mean(1))


def leaky(head: Head) -> nn.Module:
    return Leaky(head.size or 0)


class Poisoned(Source):
    """Arrays of which one is negative, and one cannot be read."""

    def __init__(self, config: DataConfig) -> None:
        self.rows: int = config.options["rows"]

    def __len__(self) -> int:
        return self.rows

    def row(self, i: int) -> Row:
        return Row(f"row {i}", None, {"label": CLASSES[i % 3]})

    def content(self, i: int) -> np.ndarray:
        if i == 5:
            raise BadSampleError("the disk has a hole here")
        return np.full((3, 8, 8), -1.0 if i == 7 else i + 1.0, np.float32)


def draw(label: int, seed: int, size: int = 24) -> bytes:
    """A PNG file with a noisy shape of the class `label`."""
    noise = np.random.default_rng([label, seed])
    y, x = np.mgrid[:size, :size]
    middle = noise.integers(8, size - 8, 2)
    shapes = [
        (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < 36,
        (abs(x - middle[0]) < 6) & (abs(y - middle[1]) < 6),
        (x + middle[0]) % 6 < 3,
    ]
    pixels = noise.integers(0, 60, (size, size, 3)) + 180 * shapes[label][..., None]
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, seeds: range) -> None:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (folder / name / f"{seed:04}.png").write_bytes(draw(label, seed))


SETTINGS: dict[str, dict[str, object]] = {
    "data": {"source": "images", "path": "photos", "validation": 0.25},
    "model": {"backbone": "tiny:conv_net"},
    "preprocess": {"kind": "image", "image_size": 16},
    "task": {"kind": "classification"},
    "encode": {"cuts": [0, 0.5, 1.0], "batch_size": 8, "segment_samples": 20, "workers": 0},
    "train": {"epochs": 2, "batch_size": 16, "lr": 0.01},
}


def write_params(folder: Path, **changes: dict[str, object]) -> Path:
    """Write params.yaml with `changes` to some sections' settings."""
    settings = {name: section | changes.get(name, {}) for name, section in SETTINGS.items()}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def write_text_network(folder: Path) -> None:
    """Write a Hugging Face directory of a tiny random BERT with a classifier of 3, and a tokenizer of ten words."""
    vocabulary = {word: number for number, word in enumerate(TOKENS)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def recycle(folder: Path, *args: str) -> subprocess.Popen[str]:
    """Start the command line in `folder`, in a process that can be killed."""
    return python(folder, "-m", "stages.cli", *args)


def python(folder: Path, *args: str, **variables: str) -> subprocess.Popen[str]:
    """Start Python in `folder`, in a session of its own, with environment `variables`."""
    environment = os.environ | {"PYTHONPATH": IMPORTS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each forward pass of an encode, by how many samples a prefix ran on."""
    sizes: list[int] = []
    run = Encoder._run

    def counted(self: Encoder, capture: Any, rows: np.ndarray, batch: Any) -> Any:
        sizes.append(len(rows))
        return run(self, capture, rows, batch)

    monkeypatch.setattr(Encoder, "_run", counted)
    return sizes
