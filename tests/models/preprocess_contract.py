"""What every preprocessing promises, and images to try it on."""

import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import BadSampleError
from pipeline.keys import digest
from pipeline.models import Preprocess

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

    def test_alike_samples_begun_at_once_have_the_bytes_of_single_ones(self, preprocess: Preprocess) -> None:
        opened = [preprocess.open(content) for content in self.good]
        for kind in {preprocess.alike(one) for one in opened} - {None}:
            alike = [one for one in opened if preprocess.alike(one) == kind]
            assert_same_bytes(preprocess.begin_alike(alike), [preprocess.begin(one) for one in alike])

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


def assert_same_bytes(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other)


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
