"""Image processors of Hugging Face: the size and the scale of a network's images."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor

from pipeline.models.images import RESAMPLE, ImageDefaults

log = logging.getLogger("recycle")

INTERPOLATIONS = {number: name for name, number in RESAMPLE.items()}


def image_defaults(source: str, settings: Any, arguments: Mapping[str, Any]) -> ImageDefaults:
    """Read the image processor's settings; a directory without one gets the usual values."""
    usual, found = ImageDefaults(), load_image_processor(source, arguments)
    processor: dict[str, Any] = {} if found is None else found.to_dict()
    size = _made_size(found) or (processor.get("size") or {}).get("height") or getattr(settings, "image_size", None)
    size = size or usual.image_size
    normalises, rescales = (found is None or getattr(found, name, None) for name in ("do_normalize", "do_rescale"))
    # what the network is given for an intensity of 0..1 is scaled first; where that gives 0..1, nothing changes
    whole = 255 * (processor.get("rescale_factor") or 1 / 255) if rescales else 255.0
    defaults = ImageDefaults(
        size if isinstance(size, int) else size[0],
        INTERPOLATIONS.get(processor.get("resample", -1), usual.interpolation),
        _triple(processor.get("image_mean") or usual.mean, whole) if normalises else (0.0, 0.0, 0.0),
        _triple(processor.get("image_std") or usual.std, whole) if normalises else _triple((1.0, 1.0, 1.0), whole),
    )
    if found is not None:
        _compare_colours(found, defaults, source)
    return defaults


def _triple(values: Any, whole: float) -> tuple[float, float, float]:
    red, green, blue = values if isinstance(values, list | tuple) else [values] * 3
    return float(red) / whole, float(green) / whole, float(blue) / whole


def _made_size(processor: Any) -> int | None:
    """Return the side of the square that an image processor returns for any image; None if it returns none."""
    output = {_process(processor, np.zeros((*shape, 3), np.uint8)).shape[1:] for shape in ((40, 60), (60, 40))}
    height, width = output.pop() if len(output) == 1 and len(min(output)) == 2 else (0, 1)
    return int(height) if height == width else None


def _compare_colours(processor: Any, defaults: ImageDefaults, source: str) -> None:
    """Warn if the processor's values of a colour differ from scaling and normalising it."""
    colour = np.array([200, 100, 50], np.uint8)
    output = _process(processor, np.broadcast_to(colour, (64, 64, 3)))
    expected = (colour / 255 - np.array(defaults.mean)) / np.array(defaults.std)
    if output.ndim == 3 and len(output) == 3 and not np.allclose(output.mean((1, 2)), expected, rtol=0.02, atol=0.02):
        log.warning(
            "%s: its image processor makes %s of the colour %s, preprocess gives %s; set preprocess.mean and std, or "
            "wrap the network in a module:function of your own",
            source,
            *([round(float(value), 2) for value in values] for values in (output.mean((1, 2)), colour, expected)),
        )


def _process(processor: Any, image: np.ndarray) -> np.ndarray:
    """Return the output of an image processor for an image, (C, H, W); empty if it fails."""
    try:
        output = processor(Image.fromarray(np.ascontiguousarray(image)), return_tensors="np")
        return np.asarray(output["pixel_values"][0])
    except Exception:  # processors of other kinds want masks, texts, several images
        return np.empty(0)


def load_image_processor(source: str, arguments: Mapping[str, Any]) -> Any | None:
    """Return the image processor of a directory or hub repository, None where it has none."""
    load: Any = AutoImageProcessor.from_pretrained
    try:
        return load(source, **arguments)
    except (OSError, ValueError, ImportError):
        return None
