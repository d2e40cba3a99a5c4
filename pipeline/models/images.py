"""Images: encoded bytes or pixel arrays -> one normalised square, (3, S, S) float32."""

import copy
import io
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, features
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

from pipeline.errors import BadSampleError, ConfigError
from pipeline.keys import JSON, content_key, digest
from pipeline.models.augment import Augment
from pipeline.models.backbone import Preprocess
from pipeline.models.config import PreprocessConfig

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", *(["AVIF"] if "avif" in features.modules else []))
"""Formats that are decoded. PIL knows more, some of which start other programs (EPS)."""
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Resampling filters by PIL's numbers, which Hugging Face's image processors use."""
PHOTOMETRIC, BITS = 262, 258
"""Tags of TIFF: what black is, and how many bits a sample has."""
Opened: TypeAlias = tuple[Tensor, bytes]
"""An image (3, H, W), uint8 or float32 in 0..1, and the key of its content where there are views to draw."""

MAX_PIXELS = 89_478_485
"""Larger images are taken for decompression bombs: 256 MiB in RGB."""
LONGEST = 16
"""Maximum ratio of the sides; of longer strips only the middle is resized, because the rest would take gigabytes."""


@dataclass(frozen=True)
class ImageDefaults:
    """The image preprocessing of a backbone, from its library."""

    image_size: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class ImagePreprocess(Preprocess):
    """Decode, make RGB, augment in an augmented view, resize, crop, scale to 0..1, normalise."""

    def __init__(self, config: PreprocessConfig, defaults: ImageDefaults, input_name: str) -> None:
        self.input_name = input_name
        self.size = config.image_size or defaults.image_size
        self.interpolation = config.interpolation or defaults.interpolation
        self.resize, self.crop = config.resize, config.crop
        self.mean, self.std = config.mean or defaults.mean, config.std or defaults.std
        self.augment = config.augment
        self._view: int | None = None
        self._augment: Augment | None = None
        self._scale, self._normalise = v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std, True)

    def __call__(self, content: object) -> dict[str, Tensor]:
        started = {name: tensor.unsqueeze(0).clone() for name, tensor in self.begin(self.open(content)).items()}
        return {name: tensor.squeeze(0) for name, tensor in self.finish(started).items()}

    def open(self, content: object) -> Opened:
        """Return the image as it was taken, and what its views are drawn from."""
        if isinstance(content, bytes):
            image = decode(content)
        elif isinstance(content, np.ndarray):
            image = from_array(content)
        else:
            raise BadSampleError(f"content is {type(content).__name__}; an image is bytes or an array")
        return image, b"" if self.augment is None else content_key(content)

    def begin(self, opened: Opened) -> dict[str, Tensor]:
        """Return the square of one image, (3, S, S), uint8, or float32 in 0..1."""
        image, key = opened
        if self._augment is not None:
            seed = int.from_bytes(content_key([key, self._view, digest(self.recipe())])[:8], "big")
            image = self._augment(_middle(image).clone(), seed)  # some transforms can write into their input
            if image.shape[1:] == (self.size, self.size):
                return {self.input_name: image.contiguous()}
        return {self.input_name: self._square(image).contiguous()}

    def alike(self, opened: Opened) -> Hashable:
        """Return the shape of an image, if it takes no more memory than its input to the network."""
        image, _ = opened
        return image.shape if image.dtype is torch.uint8 and image.nbytes <= 4 * 3 * self.size**2 else None

    def begin_alike(self, opened: Sequence[Opened]) -> list[dict[str, Tensor]]:
        if self._augment is not None or self.interpolation == "lanczos":  # PIL takes one at a time
            return super().begin_alike(opened)
        # each pixel's channels side by side, as in a decoded image: torch resizes these twice as fast
        images = torch.stack([image.movedim(0, -1) for image, _ in opened]).movedim(-1, 1)
        return [{self.input_name: square} for square in self._square(images).contiguous()]

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale to 0..1 and normalise."""
        return {name: self._normalise(self._scale(tensor)) for name, tensor in batch.items()}

    def view(self, number: int) -> "ImagePreprocess":
        """Return the preprocessing of one augmented view, from 0 on, seeded by sample key, view and recipe."""
        if self.augment is None:
            raise ConfigError("encode.views needs random changes to differ by; set preprocess.augment, or remove it")
        augmented = copy.copy(self)
        augmented._view, augmented._augment = number, Augment(self.augment)
        return augmented

    def _square(self, image: Tensor) -> Tensor:
        """Return the square that is cut out of the middle, or that the whole is squashed to, of (..., 3, H, W)."""
        mode = v2.InterpolationMode(self.interpolation)
        if self.resize == "squash":
            if _is_strip(image):  # every n-th row and column: LONGEST squared are left for each of the square's
                down, across = (max(1, side // (self.size * LONGEST**2)) for side in image.shape[-2:])
                image = image[..., ::down, ::across]
            height, width = image.shape[-2:]
            if height > LONGEST * width:  # by rows first: by columns first, each of the many rows would be enlarged
                image = _resize(image, [self.size, width], mode)
            return _resize(image, [self.size, self.size], mode)
        resized = _resize(_middle(image), [round(self.size / self.crop)], mode)
        square: Tensor = center_crop(resized, [self.size, self.size])
        return square

    def recipe(self) -> Mapping[str, JSON]:
        augment: dict[str, JSON] = {} if self._augment is None else {"augment": self.augment}
        own: dict[str, JSON] = {name: getattr(self, name) for name in ("resize", "crop", "interpolation")}
        own |= {"image_size": self.size, "mean": list(self.mean), "std": list(self.std)}
        return augment | own | {"kind": "image", "input": self.input_name}

    def save(self, folder: Path) -> None:
        """Write the settings of an image processor of Hugging Face that does the same."""
        side = {"height": self.size, "width": self.size}
        shape: dict[str, JSON] = {"image_processor_type": "ViTImageProcessor", "size": side}
        if self.resize == "crop":
            shape = {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": round(self.size / self.crop)},
                "do_center_crop": True,
                "crop_size": side,
            }
        pixels: dict[str, JSON] = {"do_convert_rgb": True, "do_resize": True, "resample": RESAMPLE[self.interpolation]}
        pixels |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        pixels |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        (folder / "preprocessor_config.json").write_text(json.dumps(shape | pixels, indent=2) + "\n", encoding="utf-8")

    def advice(self) -> str:
        return (
            f"it is given images of 3 channels and {self.size} x {self.size} pixels: set preprocess.image_size to what "
            "it takes, or its own size and channels in model.options (img_size, in_chans, image_size, ...)"
        )

    def probe_contents(self) -> Sequence[object]:
        """Return a wide and a tall image of smooth colours."""
        y, x = np.mgrid[:61, :97]
        wide = np.stack([2 * x, 4 * y, (x * y) % 256], axis=-1).astype(np.uint8)
        return wide, np.ascontiguousarray(wide.transpose(1, 0, 2))


def decode(content: bytes) -> Tensor:
    """Return an encoded image, upright, in RGB: (3, H, W) uint8; float32 in 0..1 if it is grey in 16 bits or floats.

    Raises BadSampleError if it is truncated, too large, or no image, or its white is unknown.
    """
    if not content:
        raise BadSampleError("the image file is empty")
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = MAX_PIXELS, False
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} x {image.height} pixels"
            raise BadSampleError(f"the image is too large: {size}, at most {MAX_PIXELS} are decoded")
        black, white = _range(image)
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            return from_array((np.asarray(image, np.float32) - black) / (white - black))
        # RGB drops transparency; a palette's is translated first, so that PIL needs no guess.
        image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        pixels: Tensor = pil_to_tensor(image)
        return pixels
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError(f"the image is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
        raise BadSampleError(f"the image cannot be decoded: {error}") from error


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the values of black and white of a grey image; raises BadSampleError if its type has no defined white."""
    tags = getattr(image, "tag_v2", {})
    if image.mode[0] not in "IF":
        return 0, 255
    if image.mode == "I" and image.format == "TIFF":
        raise BadSampleError(
            "the image holds whole numbers that are signed or have 32 bits, whose white is unknown; save it in 8 or 16 "
            "bits, or as floats in 0..1"
        )
    white = 1 if image.mode == "F" else 2 ** min(tags.get(BITS, (16,))) - 1
    return (white, 0) if tags.get(PHOTOMETRIC) == 0 else (0, white)


def _is_strip(image: Tensor) -> bool:
    short, long = sorted(image.shape[-2:])
    return long > LONGEST * short


def _middle(image: Tensor) -> Tensor:
    """Return the middle of a strip, cropped so that resizing places its pixels as in the whole image."""
    if not _is_strip(image):
        return image
    short, long = sorted(image.shape[-2:])
    kept = LONGEST // 2 * short
    kept += (long - kept) % 4
    sides = [min(side, kept) for side in image.shape[-2:]]
    middle: Tensor = center_crop(image, sides)
    return middle


def _resize(image: Tensor, size: list[int], mode: v2.InterpolationMode) -> Tensor:
    """Resize to [height, width], or to [shorter side]."""
    if mode is not v2.InterpolationMode.LANCZOS:  # only PIL has it; torch is two to four times as fast with the others
        resized: Tensor = resize(image, size, mode, antialias=True)
    elif image.is_floating_point():
        bands = [to_pil_image(band, mode="F") for band in torch.split(image, 1)]
        resized = torch.cat([pil_to_tensor(resize(band, size, mode)) for band in bands])
    else:
        resized = pil_to_tensor(resize(to_pil_image(image), size, mode))
    return resized


def from_array(pixels: np.ndarray) -> Tensor:
    """Return pixels (H, W) or (H, W, C), C 1, 3 or 4, in RGB: (3, H, W) uint8, or float32 in 0..1 if they are floats.

    Raises BadSampleError for another shape, type or range.
    """
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)) or 0 in pixels.shape:
        raise BadSampleError(f"the array is {pixels.shape}; an image is (H, W), or (H, W, C) with 1, 3 or 4 channels")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    pixels = pixels[:, :, :3].repeat(3 if pixels.shape[2] == 1 else 1, axis=2)
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    if pixels.dtype.kind != "f":
        raise BadSampleError(f"the array is {pixels.dtype}; an image is uint8, or floats in 0..1")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise BadSampleError(f"the array holds {pixels.min()}..{pixels.max()}; an image of floats lies in 0..1")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32))
