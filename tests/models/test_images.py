"""What images become."""

import io
import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from preprocess_contract import GREY, PreprocessContract, assert_same_bytes, bomb, encoded

from pipeline.data.media import ImageFolder
from pipeline.errors import BadSampleError
from pipeline.models import Preprocess, PreprocessConfig
from pipeline.models.images import FORMATS, MAX_PIXELS, ImageDefaults, ImagePreprocess


class TestImages(PreprocessContract):
    good = (
        encoded(),
        encoded("JPEG"),
        encoded("WEBP"),
        encoded("PNG", "P", transparency=b"\x10" * 256),
        encoded("PNG", "LA"),
        encoded("PNG", "1"),
        GREY,
        GREY[:, :, None],
        np.stack([GREY] * 4, axis=2),
        (GREY / 255).astype(np.float64),
    )
    bad = (
        b"",
        b"no image",
        encoded()[:-40],
        encoded("JPEG")[:-80],
        encoded("EPS"),
        bomb(MAX_PIXELS, 1)[:40],
        bomb(1 << 16, 1 << 16),
        bomb(MAX_PIXELS // 1000, 1001),
        "text",
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4), np.int64),
        np.full((4, 4), 255.0),
        np.full((4, 4), np.nan),
    )

    def make(self, text_folder: Path) -> Preprocess:
        return ImagePreprocess(PreprocessConfig(image_size=16), ImageDefaults(), "pixels")


class TestSquashedImages(TestImages):
    def make(self, text_folder: Path) -> Preprocess:
        config = PreprocessConfig(image_size=16, resize="squash", interpolation="bicubic")
        return ImagePreprocess(config, ImageDefaults(), "pixels")


class TestAugmentedImages(TestImages):
    def make(self, text_folder: Path) -> Preprocess:
        augment: Any = [{"RandomResizedCrop": {"size": 16}}, "RandomHorizontalFlip", {"ColorJitter": {"contrast": 0.3}}]
        config = PreprocessConfig(image_size=16, augment=augment)
        return ImagePreprocess(config, ImageDefaults(), "pixels").view(1)


def image(content: object, **settings: Any) -> torch.Tensor:
    settings = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "nearest"} | settings
    return ImagePreprocess(PreprocessConfig(**settings), ImageDefaults(), "x")(content)["x"]


def test_crop_keeps_proportions_and_squash_the_whole() -> None:
    half = np.zeros((8, 16), np.uint8)
    half[:, 12:] = 255
    assert image(half, image_size=8).max() == 0
    assert image(half, image_size=8, resize="squash").mean() == 0.25
    assert image(half, image_size=4, crop=0.5).shape == (3, 4, 4)


def test_values_are_normalised_by_channel() -> None:
    made = image(np.full((4, 4, 3), 255, np.uint8), image_size=4, mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 2.0])
    assert made.mean(dim=(1, 2)).tolist() == [1.0, 1.0, 0.0]


def test_bytes_and_arrays_of_an_image_agree() -> None:
    assert torch.equal(image(encoded(), image_size=10), image(GREY, image_size=10))
    floats = image((GREY / 255).astype(np.float32), image_size=10, interpolation="bilinear")
    assert torch.allclose(floats, image(GREY, image_size=10, interpolation="bilinear"), atol=1.01 / 255)


def test_sixteen_bits_are_scaled() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(stream, "PNG")
    assert image(stream.getvalue(), image_size=4).unique().tolist() == [1.0]


def file_of(pixels: np.ndarray, kind: str = "TIFF", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
WHITE_IS_ZERO = {"tiffinfo": {262: 0}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (file_of(RAMP), RAMP),
        (file_of(0.2 + RAMP / 10), 0.2 + RAMP / 10),
        (file_of(RAMP, "PPM"), RAMP),
        (file_of((RAMP * 65535).astype(np.uint16)), RAMP),
        (file_of((RAMP * 65535).astype(np.uint16), "PNG"), RAMP),
        (file_of((RAMP * 65535).astype(np.uint16), "PPM"), RAMP),
        (file_of((RAMP * 65535).astype(np.uint16), **WHITE_IS_ZERO), 1 - RAMP),
    ],
    ids=["float", "narrow", "pfm", "16 bits", "png", "pgm", "white is zero"],
)
def test_grey_beyond_8_bits_means_what_the_file_says(content: bytes, expected: np.ndarray) -> None:
    made = image(content, image_size=16)
    assert np.allclose(made.numpy(), expected, atol=1e-4)
    assert made.unique().numel() == 256
    assert np.allclose(image(content, image_size=16, interpolation="lanczos").numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RAMP * 255, r"the array holds 0\.0\.\.255\.0; an image of floats lies in 0\.\.1"),
        (RAMP - 0.5, r"the array holds -0\.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "an image of floats lies in 0"),
        ((RAMP * 255).astype(np.int32), "whole numbers that are signed or have 32 bits, whose white is unknown"),
    ],
)
def test_values_without_a_known_white_are_told(pixels: np.ndarray, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        image(file_of(pixels), image_size=16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_modes_that_become_rgb(mode: str) -> None:
    made = image(encoded("TIFF", mode), image_size=20)
    assert made.min() < 0.05
    assert made.max() > 0.9


def test_every_known_extension_is_decoded() -> None:
    Image.init()
    known = {extension: Image.registered_extensions().get(extension) for extension in ImageFolder.extensions}
    assert {extension for extension, kind in known.items() if kind not in FORMATS} <= {".avif"}, "Pillow may lack it"


STRIPS = [(1, 20_000), (20_001, 1), (3, 30_000), (30_000, 7)]


@pytest.mark.parametrize("shape", STRIPS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("settings", [{}, {"crop": 0.5}, {"resize": "squash"}], ids=str)
def test_a_strip_takes_little_memory(shape: tuple[int, int], interpolation: str, settings: dict[str, Any]) -> None:
    along = np.linspace(0, 255, max(shape)).astype(np.uint8)
    strip = np.broadcast_to(along if shape[1] > shape[0] else along[:, None], shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = image(np.ascontiguousarray(strip), image_size=224, interpolation=interpolation, **settings)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB; the whole, enlarged, takes 3 GB"
    profile = made.mean(dim=(0, 1) if shape[1] > shape[0] else (0, 2))
    low, high = (0.0, 1.0) if settings.get("resize") else (0.5, 0.5)
    assert abs(profile[0] - low) < 0.02
    assert abs(profile[-1] - high) < 0.02


def test_a_strip_in_augmented_views() -> None:
    config = PreprocessConfig(image_size=32, augment=[{"Resize": {"size": 224}}, "RandomHorizontalFlip"])
    preprocess = ImagePreprocess(config, ImageDefaults(), "x").view(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert preprocess(np.full((1, 100_000), 9, np.uint8))["x"].shape == (3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.parametrize("shape", [(1, 200), (1, 203), (4, 100), (400, 5)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_the_middle_of_a_strip_is_that_of_the_whole(
    shape: tuple[int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    made = image(pixels, image_size=32, interpolation=interpolation)
    monkeypatch.setattr("pipeline.models.images.LONGEST", 1000)
    assert torch.allclose(made, image(pixels, image_size=32, interpolation=interpolation), atol=1.01 / 255)


def test_orientation_of_the_camera_is_followed() -> None:
    upright = np.zeros((8, 8), np.uint8)
    upright[:4] = 255
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by 90 degrees
    Image.fromarray(np.rot90(upright).copy()).save(stream, "PNG", exif=exif)
    assert torch.equal(image(stream.getvalue(), image_size=8), image(upright, image_size=8))


def test_a_bomb_is_told_by_its_size_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSampleError, match=r"too large|pixels"):
            image(bomb(MAX_PIXELS // 1000, 1001), image_size=4)


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(32, 32), (40, 61), (3, 70), (70, 3), (1, 200)])
def test_images_of_one_size_are_resized_at_once_to_the_same_bytes(resize, interpolation, shape):
    config = PreprocessConfig(image_size=32, resize=resize, interpolation=interpolation)
    preprocess = ImagePreprocess(config, ImageDefaults(), "pixels")
    drawn = np.random.default_rng(0).integers(0, 256, (5, *shape, 3), np.uint8)
    opened = [preprocess.open(image) for image in drawn]
    assert {preprocess.alike(one) for one in opened} == {(3, *shape)}
    assert_same_bytes(preprocess.begin_alike(opened), [preprocess.begin(one) for one in opened])


def test_large_images_wait_for_no_others():
    preprocess = ImagePreprocess(PreprocessConfig(image_size=32), ImageDefaults(), "pixels")
    assert preprocess.alike(preprocess.open(np.zeros((64, 65), np.uint8))) is None
