"""Every model of torchvision for classification, segmentation, detection and video, with random weights.

Inputs are as small as a network accepts: a proof is about which values meet where, not about how many there are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torchvision.models as tv
from torch import Generator, Tensor, nn

from zoo.catalogue import Entry
from zoo.sizes import smallest

PIXELS = (64, 70, 96, 128, 224, 299)
"""Below 64 the last feature map is one pixel, and the batch norm of two samples is blind: +1 and -1. 70 suits patches
of 14; three windows of 7 pixels need 224; Inception's auxiliary head was made for 299."""
FRAMES = 16
CLASSES = 10
KEYPOINTS = 17

BUILT_FOR = {
    "torchvision.models.vision_transformer": lambda pixels: {"image_size": pixels},
    "torchvision.models.maxvit": lambda pixels: {"input_size": (pixels, pixels)},
}
"""Modules whose networks are built for one image size, and the setting that says which."""


def entries() -> list[Entry]:
    """Return the models by task, in alphabetical order."""
    images = {"torchvision classification": tv, "torchvision segmentation": tv.segmentation}
    found = [
        Entry(group, name, partial(build, name), partial(batch, name), weights(name))
        for group, module in images.items()
        for name in tv.list_models(module=module)
    ]
    found += [
        Entry("torchvision detection", name, partial(detector, name), boxed_images, weights(name))
        for name in tv.list_models(module=tv.detection)
    ]
    return found + [
        Entry(
            "torchvision video", name, partial(build, name, FRAMES), partial(batch, name, frames=FRAMES), weights(name)
        )
        for name in tv.list_models(module=tv.video)
    ]


def weights(name: str) -> int:
    """Return the number of parameters of the published model; the head of ours is smaller."""
    return max(version.meta["num_params"] for version in tv.get_model_weights(name))


def build(name: str, frames: int = 0) -> nn.Module:
    """Return the network, built for the size of the images in `batch`."""
    return built_for(name, accepted(name, frames))


def batch(name: str, size: int, frames: int = 0) -> Tensor:
    """Return images (B, 3, H, W), or clips (B, 3, T, H, W)."""
    return torch.randn(size, *shape(frames, accepted(name, frames)), generator=Generator().manual_seed(size))


@cache
def accepted(name: str, frames: int) -> int:
    return smallest(partial(built_for, name), PIXELS, partial(shape, frames))


def shape(frames: int, pixels: int) -> tuple[int, ...]:
    return (3, frames, pixels, pixels) if frames else (3, pixels, pixels)


def built_for(name: str, pixels: int) -> nn.Module:
    setting = BUILT_FOR.get(tv.get_model_builder(name).__module__, lambda _: {})
    with small_clips(pixels):
        return tv.get_model(name, weights=None, num_classes=CLASSES, **segmentation(name), **setting(pixels))


def small_clips(pixels: int) -> AbstractContextManager[Any]:
    """Let MViT be built for small clips: its builders insist on 224 pixels, where a forward pass takes seconds."""
    network = partial(tv.video.MViT, spatial_size=(pixels, pixels))
    return patch("torchvision.models.video.mvit.MViT", lambda spatial_size, **settings: network(**settings))


def segmentation(name: str) -> dict[str, Any]:
    """Return the settings of a network with a backbone: random weights there, and an auxiliary head if it can."""
    if name not in tv.list_models(module=tv.segmentation):
        return {}
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    return {"weights_backbone": None, **auxiliary}


class Detector(nn.Module):
    """A detector on stacked images and targets, as a data loader gives them; torchvision's take lists.

    Targets are given in eval mode too, where they change nothing: a suffix decides by its own mode whether it needs
    them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, **targets: Tensor) -> Any:
        """Return detections per image, or losses: images (B, 3, H, W), boxes (B, N, 4), labels (B, N) and so on."""
        each = [{name: rows[i] for name, rows in targets.items()} for i in range(len(images))]
        return self.network(list(images), each)


def detector(name: str) -> nn.Module:
    """Return a detector that keeps images small and every detection; random scores would be under the threshold."""
    network = tv.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    network.transform.min_size, network.transform.max_size = (PIXELS[0],), PIXELS[0]
    for module in network.modules():
        if hasattr(module, "score_thresh"):
            module.score_thresh = 0.0
    return Detector(network)


def boxed_images(size: int) -> dict[str, Tensor]:
    """Return images with four objects each: boxes, labels, masks and keypoints."""
    generator, pixels, objects = Generator().manual_seed(size), PIXELS[0], 4
    corner = 30 * torch.rand(size, objects, 2, generator=generator)
    boxes = torch.cat([corner, corner + 5 + 25 * torch.rand(size, objects, 2, generator=generator)], -1)
    points = corner[:, :, None] + 5 * torch.rand(size, objects, KEYPOINTS, 2, generator=generator)
    return {
        "images": torch.rand(size, 3, pixels, pixels, generator=generator),
        "boxes": boxes,
        "labels": torch.randint(1, 3, (size, objects), generator=generator),
        "masks": torch.randint(0, 2, (size, objects, pixels, pixels), dtype=torch.uint8, generator=generator),
        "keypoints": torch.cat([points, torch.ones(size, objects, KEYPOINTS, 1)], -1),
    }
