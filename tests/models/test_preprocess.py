"""What every preprocessing promises, and what images and texts become."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerFast

from pipeline.data.media import ImageFolder
from pipeline.errors import BadSampleError, ConfigError
from pipeline.keys import digest
from pipeline.models import Preprocess, PreprocessConfig
from pipeline.models.backbone import ArrayPreprocess
from pipeline.models.images import FORMATS, MAX_PIXELS, ImageDefaults, ImagePreprocess
from pipeline.models.texts import SpanPreprocess, TextPreprocess, WordPreprocess, load_tokenizer, longest_input

GREY = np.arange(30 * 20, dtype=np.uint8).reshape(30, 20)


class PreprocessContract:
    """A subclass makes a preprocessing, and gives good and bad contents."""

    good: tuple[Any, ...]
    bad: tuple[Any, ...]

    @pytest.fixture
    def preprocess(self, text_folder: Path) -> Preprocess:
        return self.make(text_folder)

    def make(self, text_folder: Path) -> Preprocess:
        raise NotImplementedError

    def test_inputs_are_finite_tensors_of_the_same_names_and_types(self, preprocess: Preprocess) -> None:
        made = [preprocess(content) for content in self.good]
        assert all(type(tensor) is torch.Tensor for inputs in made for tensor in inputs.values())
        assert all(tensor.isfinite().all() for inputs in made for tensor in inputs.values())
        assert (
            len({tuple((name, tensor.dtype, tensor.ndim) for name, tensor in inputs.items()) for inputs in made}) == 1
        )

    def test_same_content_same_values_from_a_copy_too(self, preprocess: Preprocess) -> None:
        copy = pickle.loads(pickle.dumps(preprocess))
        assert copy.recipe() == preprocess.recipe()
        for content in self.good:
            first, second = preprocess(content), copy(content)
            assert all(torch.equal(first[name], second[name]) for name in first)

    def test_ships_cheaply(self, preprocess: Preprocess) -> None:
        assert len(pickle.dumps(preprocess)) < 2_000_000

    def test_recipe_is_json_and_steady(self, preprocess: Preprocess, text_folder: Path) -> None:
        before = digest(preprocess.recipe())
        preprocess(self.good[0])
        assert digest(json.loads(json.dumps(preprocess.recipe()))) == before == digest(self.make(text_folder).recipe())

    def test_pad_names_inputs(self, preprocess: Preprocess) -> None:
        assert set(preprocess.pad) <= set(preprocess(self.good[0]))

    def test_bad_contents_say_why(self, preprocess: Preprocess) -> None:
        for content in self.bad:
            with pytest.raises(BadSampleError, match=r".+"):
                preprocess(content)


def encoded(kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(GREY).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


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


class TestArrays(PreprocessContract):
    good = (np.arange(6, dtype=np.int16), np.zeros((3,), np.float64))
    bad = (b"bytes", "text", np.array([np.inf]))

    def make(self, text_folder: Path) -> Preprocess:
        return ArrayPreprocess("x")


class TestTexts(PreprocessContract):
    good = ("one two", ("one", "two three"), "unknown words", "one " * 50)
    bad = ("", " \n", ("one", ""), b"bytes", np.zeros(3))

    def make(self, text_folder: Path) -> Preprocess:
        inputs = ("input_ids", "token_type_ids", "attention_mask")
        return TextPreprocess(load_tokenizer(str(text_folder)), 8, inputs)

    def test_no_padding_and_cut_off(self, preprocess: Preprocess) -> None:
        short, long = preprocess("one two"), preprocess("one " * 50)
        assert short["input_ids"].tolist() == [2, 5, 6, 3]
        assert short["attention_mask"].tolist() == [1] * 4
        assert len(long["input_ids"]) == 8
        assert preprocess.pad == {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0}

    def test_partner_is_the_second_segment(self, preprocess: Preprocess) -> None:
        both = preprocess(("one", "two three"))
        assert both["input_ids"].tolist() == [2, 5, 3, 6, 7, 3]
        assert both["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]

    def test_another_vocabulary_is_another_recipe(self, preprocess: Preprocess, text_folder: Path) -> None:
        file = text_folder / "tokenizer.json"
        file.write_text(file.read_text().replace('"three"', '"drei"'))
        assert self.make(text_folder).recipe()["tokenizer"] != preprocess.recipe()["tokenizer"]


class TestWords(PreprocessContract):
    good = (["one"], ["one", "unheard", "of"], ["good-bad", "two three"], ["one"] * 50)
    bad = ([], [""], [" ", " "], ["one", 2], ("one", "two"), "one two", b"bytes")

    def make(self, text_folder: Path) -> Preprocess:
        return WordPreprocess(load_tokenizer(str(text_folder)), 8, ("input_ids", "attention_mask"))

    def test_a_word_is_named_at_its_first_token(self, preprocess: Preprocess) -> None:
        made = preprocess(["one", "good-bad", "two"])
        assert made["input_ids"].tolist() == [2, 5, 8, 1, 9, 6, 3]
        assert made["extra.word"].tolist() == [-1, 0, 1, -1, -1, 2, -1]

    def test_words_that_are_cut_off_or_have_no_token_do_not_occur(self, preprocess: Preprocess) -> None:
        assert preprocess(["one"] * 50)["extra.word"].tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]
        assert preprocess(["one", "  ", "two"])["extra.word"].tolist() == [-1, 0, 2, -1]
        assert preprocess.excess(["one"] * 50, preprocess(["one"] * 50)) == 44


class TestSpans(PreprocessContract):
    good = (("two", "one"), ("one", "two three good"), ("two", "one " * 50))
    bad = ("one", ["one", "two"], ("two", " "), ("one " * 50, "two"))

    def make(self, text_folder: Path) -> Preprocess:
        return SpanPreprocess(load_tokenizer(str(text_folder)), 8, ("input_ids", "token_type_ids"))

    def test_characters_are_those_of_the_text(self, preprocess: Preprocess) -> None:
        made = preprocess(("one", "two  three"))
        assert made["input_ids"].tolist() == [2, 5, 3, 6, 7, 3]
        assert made["extra.chars"].tolist() == [[-1, -1]] * 3 + [[0, 3], [5, 10], [-1, -1]]

    def test_the_text_alone_is_cut_off(self, preprocess: Preprocess) -> None:
        made = preprocess(("one two", "good " * 50))
        assert made["input_ids"].tolist() == [2, 5, 6, 3, 8, 8, 8, 3]
        with pytest.raises(BadSampleError, match=r"no room for the text within preprocess\.max_length 8"):
            preprocess(("one " * 50, "two"))


@pytest.mark.parametrize(("name", "trimmed"), [("bytes", True), ("bytes", False), ("spaces", True)])
def test_words_of_tokenizers_that_count_spaces(tmp_path: Path, name: str, trimmed: bool) -> None:
    space = {"bytes": "\u0120", "spaces": "\u2581"}[name]
    vocabulary = {"<pad>": 0, "<unk>": 1, space: 2, "a": 3, "b": 4, f"{space}a": 5, f"{space}b": 6}
    tokenizer = Tokenizer(BPE(vocabulary, [(space, "a"), (space, "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(False, trim_offsets=trimmed) if name == "bytes" else Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    made = WordPreprocess(load_tokenizer(str(tmp_path)), 8, ("input_ids",))(["a", "ab", "b"])
    assert made["input_ids"].tolist() == [3 if name == "bytes" else 5, 5, 4, 6]
    assert made["extra.word"].tolist() == [0, 1, -1, 2]


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


def test_longest_input(text_folder: Path) -> None:
    tokenizer = load_tokenizer(str(text_folder))
    tokenizer.model_max_length = 64
    assert longest_input(None, tokenizer, None) == 64
    assert longest_input(None, tokenizer, 32) == 32
    assert longest_input(16, tokenizer, 32) == 16
    with pytest.raises(ConfigError, match=r"max_length is 48; the backbone has 32 positions"):
        longest_input(48, tokenizer, 32)
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(ConfigError, match="max_length is not set and the tokenizer states none"):
        longest_input(None, tokenizer, 32)


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded .* set preprocess\.tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 0}, {"crop": 0.0}, {"max_length": 1}, {"std": [0.0, 1.0, 1.0]}, {"resize": "squash", "crop": 0.5}],
)
def test_bounds(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PreprocessConfig(**settings)
