"""One small network per family, with a batch of any size up to 4 and a place in the middle to cut it."""

from types import SimpleNamespace

import timm
import torch
import torchvision.models as tv
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from pipeline.split import split


def words(size):
    lengths = torch.tensor([9, 12, 5, 7])[:size, None]
    mask = (torch.arange(12) < lengths).long()
    drawn = torch.randint(1, 50, (size, 12), generator=torch.Generator().manual_seed(size))
    return {"input_ids": drawn * mask, "attention_mask": mask}


def images(size):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))


def bert():
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **shape))


def gpt2():
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=50, use_cache=False, **tokens))


def vit():
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, hidden_dropout_prob=0.1, **shape))


class Skip(nn.Module):
    """A connection over the cut, from the output of its first layer."""

    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.3), nn.Tanh()) for _ in range(3)]
        self.a, self.b, self.c = layers
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        first = self.a(x)
        return self.head(self.c(self.b(first)) + first)


NETS = {
    "bert": (bert, words, 0.5),
    "gpt2": (gpt2, words, 0.5),
    "vit": (vit, lambda size: {"pixel_values": images(size)}, 0.5),
    "resnet": (lambda: tv.resnet18(num_classes=10), images, "layer3"),
    "tinynet": (lambda: timm.create_model("tinynet_e", drop_path_rate=0.2, drop_rate=0.2), images, 0.75),
    "skip": (Skip, lambda size: images(size)[:, 0, 0], "c"),
}


def halves(name):
    make, batch, at = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    prefix, suffix = split(model, at, batch(2))
    return SimpleNamespace(model=model, prefix=prefix, suffix=suffix, batch=batch, at=at)
