"""Backbones of Hugging Face: their heads, weights, configurations and image processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_contract import CLASSES, EMBEDDING, SPAN, TOKENS, BackboneContract, ImageBackboneContract
from PIL import Image
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

from pipeline.errors import ConfigError, ModelError
from pipeline.files import sha256
from pipeline.models import ModelConfig, PreprocessConfig, load, network_inputs
from pipeline.tasks import Head, read_tensor

pytestmark = pytest.mark.slow


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
