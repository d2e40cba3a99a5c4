"""The smallest model of every family of timm, with random weights, on images as small as it accepts.

A family is a module of timm; its smallest model is the one with the fewest parameters.
"""

import warnings
from functools import cache, partial

import timm
import torch
from torch import Generator, Tensor, nn

from zoo.catalogue import Entry
from zoo.sizes import smallest, without_weights

PIXELS = (64, 96, 128, 160, 192, 224, 240, 256, 384, 512, 1024)
OPTIONS = {"num_classes": 10, "drop_rate": 0.2, "drop_path_rate": 0.2}
"""Few classes for small heads; dropout and stochastic depth, so that training is random."""
LARGE = {"deepseek_vit": 420_000_000, "gemma4_vit": 170_000_000}
"""Parameters of the families without a small model, which the runner must know before it makes one."""


def entries() -> list[Entry]:
    """Return one model of each family."""
    return [
        Entry(
            "timm",
            family,
            partial(build, family),
            partial(images, family),
            LARGE.get(family, 0),
            partial(member, family),
        )
        for family in timm.list_modules()
        if timm.list_models(module=family)
    ]


def build(family: str) -> nn.Module:
    """Return the family's network, built for the size of `images`."""
    return built_for(member(family), pixels(family))


def images(family: str, size: int) -> Tensor:
    """Return images (B, 3, H, W)."""
    return torch.randn(size, 3, pixels(family), pixels(family), generator=Generator().manual_seed(size))


@cache
def member(family: str) -> str:
    """Return the name of the family's smallest model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return min(timm.list_models(module=family), key=parameters)


@cache
def pixels(family: str) -> int:
    return smallest(partial(built_for, member(family)), PIXELS, lambda size: (3, size, size))


def parameters(name: str) -> int:
    return sum(item.numel() for item in without_weights(partial(timm.create_model, name)).parameters())


def built_for(name: str, size: int) -> nn.Module:
    """Return the network for images of `size`, with those of the options that it knows."""
    options = OPTIONS | {"img_size": size}
    while True:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            unknown = [option for option in options if f"'{option}'" in str(error)]
            if not unknown:
                raise
            del options[unknown[0]]
