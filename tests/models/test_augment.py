"""Random changes of images: what may be set, and that they are pure functions of content, view and recipe."""

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from pipeline.errors import BadSampleError, ConfigError
from pipeline.models import ModelConfig, PreprocessConfig, load
from pipeline.models.augment import Augment
from pipeline.models.images import ImageDefaults, ImagePreprocess
from pipeline.tasks import Head

CROP = {"RandomResizedCrop": {"size": 16, "scale": [0.3, 1.0]}}
EVERYTHING = [CROP, "RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.5}}, "RandAugment"]


def photo(seed: int = 0, height: int = 40, width: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def preprocess(augment: Any = EVERYTHING, **settings: Any) -> ImagePreprocess:
    return ImagePreprocess(PreprocessConfig(**{"image_size": 16} | settings, augment=augment), ImageDefaults(), "x")


@pytest.mark.parametrize(
    ("augment", "fault"),
    [
        (["RandomHorizontalFlop"], r"no transform 'RandomHorizontalFlop' \(near: RandomHorizontalFlip"),
        (["os"], "no transform 'os'"),
        (["Transform"], "no transform 'Transform'"),
        (["__init__"], "no transform '__init__'"),
        ([{"RandomHorizontalFlip": {"q": 0.5}}], "unexpected keyword argument 'q'; it takes p"),
        ([{"RandomHorizontalFlip": {"p": 2.0}}], "RandomHorizontalFlip with .* interval"),
        ([{"RandomHorizontalFlip": 0.5}], "valid dictionary"),
        (["RandomResizedCrop"], "missing 1 required positional argument: 'size'; it takes size, scale, ratio"),
        ([{"AutoAugment": {"policy": "x"}}], "'x' is not a valid AutoAugmentPolicy"),
        ([{"RandomApply": {"transforms": ["ColorJiter"]}}], "no transform 'ColorJiter' .near: ColorJitter"),
        ([{"RandomApply": {"transforms": [3]}}], "are no transforms; write each as its name"),
        (["CutMix"], "CutMix cannot be used on an image .* change its arguments or remove it"),
        ([{"FiveCrop": {"size": 3}}], "FiveCrop returns tuple; an image stays"),
        (["Grayscale"], r"Grayscale returns \(1, .*\) of torch.uint8; an image stays \(3, H, W\)"),
        (["ToPILImage"], "ToPILImage returns Image"),
        ([{"Lambda": {"lambd": "print"}}], "not callable"),
        ([{"RandomResizedCrop": {"size": 16}}, {"RandomCrop": {"size": 17}}], "RandomCrop cannot be used"),
        ([], "at least 1 item"),
        (5, "valid dictionary"),
    ],
)
def test_what_is_no_augmentation_is_refused_with_the_remedy(augment: Any, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        PreprocessConfig(augment=augment)


@pytest.mark.parametrize("kind", ["text", "array"])
def test_only_images_are_augmented(kind: Any) -> None:
    with pytest.raises(ValidationError, match=f"augment is set, but kind is '{kind}'; only images"):
        PreprocessConfig(kind=kind, augment=["RandomHorizontalFlip"])


def test_a_backbone_that_takes_no_images_refuses_to_augment(text_folder: Any) -> None:
    config = ModelConfig(backbone=f"hf:{text_folder}", weights=None)
    with pytest.raises(ConfigError, match=r"preprocess\.augment is for images, and TextPreprocess"):
        load(config, PreprocessConfig(augment=["RandomHorizontalFlip"]), Head("classes", 3))


def test_transforms_may_be_written_in_several_ways() -> None:
    written = {"RandomHorizontalFlip": None, "ColorJitter": {"hue": 0.1}}
    expected = [{"RandomHorizontalFlip": {}}, {"ColorJitter": {"hue": 0.1}}]
    assert PreprocessConfig(augment=written).augment == expected
    assert PreprocessConfig(augment=["RandomHorizontalFlip", {"ColorJitter": {"hue": 0.1}}]).augment == expected
    inner = PreprocessConfig(augment={"RandomApply": {"transforms": "RandomVerticalFlip", "p": 0.1}}).augment
    assert inner == [{"RandomApply": {"transforms": [{"RandomVerticalFlip": {}}], "p": 0.1}}]


def test_a_crop_may_ask_for_more_pixels_than_the_image_it_is_tried_on_first() -> None:
    big = preprocess([{"RandomCrop": {"size": 300}}]).view(0)
    assert big(photo(0, 320, 310))["x"].shape == (3, 16, 16)
    with pytest.raises(BadSampleError, match=r"RandomCrop cannot be used on an image \(3, 40, 30\)"):
        big(photo())


def test_a_view_is_a_pure_function_that_moves_no_other_randomness() -> None:
    view = preprocess().view(3)
    expected = view(photo())["x"]
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        view(photo(seed + 1))
        assert torch.equal(view(photo())["x"], expected)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])


def test_randomness_is_put_back_after_a_fault_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(BadSampleError):
        Augment([{"RandomHorizontalFlip": {}}, {"RandomCrop": {"size": 99}}])(torch.zeros(3, 8, 8), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_samples_and_recipes_are_drawn_apart() -> None:
    """The same pixels under other keys, views or settings are cropped elsewhere."""
    plain, array = preprocess([CROP]), np.asarray(Image.open(io.BytesIO(photo())))
    drawn = [plain.view(number)(photo())["x"] for number in range(4)]
    drawn += [plain(photo())["x"], plain.view(0)(array)["x"], preprocess([CROP], crop=0.9).view(0)(photo())["x"]]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == 7


def test_the_recipe_of_a_view_has_the_augmentation_and_the_plain_one_is_as_without() -> None:
    without = ImagePreprocess(PreprocessConfig(image_size=16), ImageDefaults(), "x")
    plain = preprocess([CROP])
    assert plain.recipe() == without.recipe()
    assert torch.equal(plain(photo())["x"], without(photo())["x"])
    assert plain.view(0).recipe() == plain.view(1).recipe() == {**plain.recipe(), "augment": [CROP]}


def test_a_square_of_the_right_size_is_left_as_it_is_and_another_becomes_it() -> None:
    """A centre crop of the whole decoded image; `crop` would zoom in, were it applied again."""
    image = photo(0, 40, 40)
    middle = np.asarray(Image.open(io.BytesIO(image)))[12:28, 12:28]
    exact = preprocess([{"CenterCrop": {"size": 16}}], crop=0.5).view(0)
    assert torch.equal(exact.begin(exact.open(image))["x"], torch.from_numpy(middle.copy()).permute(2, 0, 1))
    larger = preprocess([{"CenterCrop": {"size": 32}}], crop=0.5).view(0)
    assert torch.equal(larger.begin(larger.open(image))["x"], torch.from_numpy(middle.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("content", [photo(), np.full((16, 16), 0.5, np.float32)])
def test_views_leave_the_image_they_share_as_it_is(content: Any) -> None:
    erasing = preprocess([{"RandomErasing": {"p": 1.0, "inplace": True}}]).view(0)
    opened = erasing.open(content)
    before = opened[0].clone()
    empty = {name: tensor[None] for name, tensor in erasing.begin(opened).items()}
    erasing.finish(empty)
    assert torch.equal(opened[0], before)
