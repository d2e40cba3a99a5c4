"""Every model of torchvision for classification, segmentation, detection and video, with random weights.

Inputs are as small as a network accepts: a proof is about which values meet where, not about how many there are.
"""

from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torchvision.models as tv
from torch import Generator, Tensor, nn

from zoo.catalogue import Entry
from zoo.sizes import smallest

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]

SMALL = 64
"""Pixels: below, the last feature map is one pixel, and the batch norm of two samples is blind: +1 and -1."""
IMAGES: Shapes = tuple((3, pixels, pixels) for pixels in (SMALL, 70, 96, 128, 224, 299))
"""70 suits patches of 14, 224 five halvings and a window of 7; Inception's auxiliary head was made for 299."""
CLIPS: Shapes = tuple((3, frames, pixels, pixels) for frames, pixels in ((8, SMALL), (16, SMALL), (16, 224)))
CLASSES = 10
KEYPOINTS = 17

BUILT_FOR = {
    "torchvision.models.vision_transformer": lambda pixels: {"image_size": pixels},
    "torchvision.models.maxvit": lambda pixels: {"input_size": (pixels, pixels)},
}
"""Modules whose networks are built for one image size, and the setting that says which."""


def entries() -> list[Entry]:
    """Return the models by task, in alphabetical order."""
    groups = {
        "torchvision classification": (tv, IMAGES),
        "torchvision segmentation": (tv.segmentation, IMAGES),
        "torchvision video": (tv.video, CLIPS),
    }
    found = [
        Entry(group, name, partial(build, name, shapes), partial(batch, name, shapes), weights(name))
        for group, (module, shapes) in groups.items()
        for name in tv.list_models(module=module)
    ]
    detectors = tv.list_models(module=tv.detection)
    group = "torchvision detection"
    return found + [Entry(group, name, partial(detector, name), boxed_images, weights(name)) for name in detectors]


def weights(name: str) -> int:
    """Return the number of parameters of the published model; the head of ours is smaller."""
    return max(version.meta["num_params"] for version in tv.get_model_weights(name))


def build(name: str, shapes: Shapes) -> nn.Module:
    """Return the network, built for the images or clips of `batch`."""
    return built_for(name, accepted(name, shapes))


def batch(name: str, shapes: Shapes, size: int) -> Tensor:
    """Return images (B, 3, H, W), or clips (B, 3, T, H, W)."""
    return torch.randn(size, *accepted(name, shapes), generator=Generator().manual_seed(size))


@cache
def accepted(name: str, shapes: Shapes) -> Shape:
    return smallest(partial(built_for, name), shapes, lambda shape: shape)


def built_for(name: str, shape: Shape) -> nn.Module:
    setting = BUILT_FOR.get(tv.get_model_builder(name).__module__, lambda _: {})
    with small_clips(shape[-1]):
        return tv.get_model(name, weights=None, num_classes=CLASSES, **segmentation(name), **setting(shape[-1]))


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
    them. Boxes and keypoints are whole pixels, as the network looks at them before its first layer: a split decides
    nothing there by the values of floating-point inputs, which a suffix never sees.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, **targets: Tensor) -> Any:
        """Return detections per image, or losses: images (B, 3, H, W), boxes (B, N, 4), labels (B, N) and so on."""
        targets |= {name: targets[name].float() for name in ("boxes", "keypoints")}
        each = [{name: rows[i] for name, rows in targets.items()} for i in range(len(images))]
        return self.network(list(images), each)


def detector(name: str) -> nn.Module:
    """Return a detector that keeps images small, and a few detections of any score: random ones are low."""
    network = tv.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    network.transform.min_size, network.transform.max_size = (SMALL,), SMALL
    for module in network.modules():
        for setting, value in {"score_thresh": 0.0, "detections_per_img": 10}.items():
            if hasattr(module, setting):
                setattr(module, setting, value)
    return Detector(network)


def boxed_images(size: int) -> dict[str, Tensor]:
    """Return images with four objects each: boxes, labels, masks and keypoints."""
    generator, pixels, objects = Generator().manual_seed(size), SMALL, 4
    corner = torch.randint(0, 30, (size, objects, 2), generator=generator)
    boxes = torch.cat([corner, corner + torch.randint(5, 30, (size, objects, 2), generator=generator)], -1)
    points = corner[:, :, None] + torch.randint(0, 5, (size, objects, KEYPOINTS, 2), generator=generator)
    return {
        "images": torch.rand(size, 3, pixels, pixels, generator=generator),
        "boxes": boxes,
        "labels": torch.randint(1, 3, (size, objects), generator=generator),
        "masks": torch.randint(0, 2, (size, objects, pixels, pixels), dtype=torch.uint8, generator=generator),
        "keypoints": torch.cat([points, torch.ones_like(points[..., :1])], -1),
    }
