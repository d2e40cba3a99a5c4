"""What every backbone promises, with each head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.models import Backbone, ModelConfig, PreprocessConfig, load
from pipeline.tasks import Head, read_tensor

CLASSES = Head("classes", size=5)
EMBEDDING = Head("embedding")
TOKENS, SPAN = Head("tokens", size=5), Head("span")
IMAGE = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)


class BackboneContract:
    """A subclass names a backbone with random weights, a content, and the width of its features."""

    content: object
    width: int
    settings: Mapping[str, Any] = {}

    def backbone(self, folder: Path) -> str:
        raise NotImplementedError

    def load(self, folder: Path, head: Head, **settings: Any) -> Backbone:
        model = ModelConfig(**{"backbone": self.backbone(folder), "weights": None} | settings)
        return load(model, PreprocessConfig(**self.settings), head)

    def run(self, backbone: Backbone) -> Tensor:
        inputs = backbone.preprocess(self.content)
        with torch.no_grad():
            return read_tensor(backbone.model.eval()(**{name: torch.stack([x, x]) for name, x in inputs.items()}))

    @pytest.mark.parametrize(
        ("head", "width"), [(CLASSES, 5), (EMBEDDING, None), (Head("embedding", layers=(7, 3)), 3)]
    )
    def test_ends_in_the_head(self, text_folder: Path, head: Head, width: int | None) -> None:
        backbone = self.load(text_folder, head)
        output = self.run(backbone)
        assert output.shape == (2, width or self.width)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output[0], output[1])
        assert backbone.name == self.backbone(text_folder)

    @pytest.mark.parametrize("head", [CLASSES, Head("embedding", layers=(3,))])
    def test_the_seed_decides_random_weights(self, text_folder: Path, head: Head) -> None:
        self.backbone(text_folder)
        before = torch.get_rng_state()
        one, same, other = (self.load(text_folder, head, seed=seed).model.state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(before, torch.get_rng_state())

    def test_layers_go_before_the_last_linear_layer(self, text_folder: Path) -> None:
        plain = self.load(text_folder, CLASSES)
        layered = self.load(text_folder, Head("classes", size=5, layers=({"dropout": 0.2}, {"mlp": [7]})))
        assert self.run(layered).shape == (2, 5)
        body = {name: tensor for name, tensor in layered.model.state_dict().items() if name not in layered.fresh}
        own = plain.model.state_dict()
        assert len(own) - len(body) in (1, 2)  # the weight of the last layer, and its bias
        assert all(torch.equal(tensor, own[name]) for name, tensor in body.items())
        shapes = [list(layered.model.get_parameter(name).shape) for name in sorted(layered.fresh)]
        assert shapes == [[7], [7, shapes[1][1]], [5], [5, 7]]

    def test_every_weight_gets_a_gradient(self, text_folder: Path) -> None:
        backbone = self.load(text_folder, EMBEDDING)
        inputs = {name: torch.stack([x, x]) for name, x in backbone.preprocess(self.content).items()}
        backbone.model.eval()(**inputs).sum().backward()
        assert [name for name, weight in backbone.model.named_parameters() if weight.grad is None] == []


class ImageBackboneContract(BackboneContract):
    content = IMAGE
    settings: Mapping[str, Any] = {"image_size": 32}
