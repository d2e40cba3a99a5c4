"""Samples that are alike are preprocessed at once, and set aside one by one."""

import numpy as np
import torch

from pipeline.data import Row, Source
from pipeline.encode.decoding import Chunk, decode_rows
from pipeline.errors import BadSampleError
from pipeline.models import PreprocessConfig
from pipeline.models.images import ImageDefaults, ImagePreprocess


class Given(Source):
    """Contents from a list."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def row(self, i):
        return Row(str(i), None, {"label": 0})

    def content(self, i):
        return self.contents[i]


class Refusing(ImagePreprocess):
    """Refuses images whose first pixel is 255, before they are resized."""

    def begin(self, opened):
        if opened[0][0, 0, 0] == 255:
            raise BadSampleError("the first pixel is 255")
        return super().begin(opened)

    def begin_alike(self, opened):
        super(ImagePreprocess, self).begin_alike(opened)  # refuses, too
        return super().begin_alike(opened)


def images(*shapes):
    drawn = np.random.default_rng(0)
    return [drawn.integers(0, 255, shape, np.uint8) for shape in shapes]


def test_samples_of_several_sizes_and_bad_ones_come_as_if_each_was_alone():
    contents = [*images((9, 9), (9, 9), (9, 9), (12, 7), (60, 60), (9, 9), (9, 9)), "no image"]
    contents[1][0, 0] = 255
    plain = Refusing(PreprocessConfig(image_size=16, augment=[{"RandomCrop": {"size": 5}}]), ImageDefaults(), "x")
    views = [plain, plain.view(0)]
    together = decode_rows(Given(contents), Chunk(np.arange(8), views))
    for number, view in enumerate(together):
        assert view.rows.tolist() == [0, 2, 3, 4, 5, 6]
        assert {bad.row: bad.reason for bad in view.bad} == {
            1: "the first pixel is 255",
            7: "content is str; an image is bytes or an array",
        }
        alone = [decode_rows(Given(contents), Chunk(np.array([row]), views))[number] for row in view.rows]
        assert torch.equal(view.inputs["x"], torch.cat([one.inputs["x"] for one in alone]))
