"""Image models split exactly."""

import pytest
import timm
import torch
import torchvision.models as tv
from split_contract import SplitContract, call, recycle
from transformers import ViTConfig, ViTForImageClassification

from pipeline.split import split

pytestmark = pytest.mark.slow


def images(size, pixels):
    return torch.randn(size, 3, pixels, pixels, generator=torch.Generator().manual_seed(size))


class TestEfficientNetLite0(SplitContract):
    def model(self):
        return timm.create_model("tf_efficientnet_lite0", num_classes=10, drop_path_rate=0.2, drop_rate=0.2)

    def example(self, size):
        return images(size, 64)


class TestResNet18(SplitContract):
    def model(self):
        return tv.resnet18(num_classes=10)

    def example(self, size):
        return images(size, 48)


class TestResNet34(SplitContract):
    def model(self):
        return tv.resnet34(num_classes=10)

    def example(self, size):
        return images(size, 32)


class TestMobileNetV3Small(SplitContract):
    def model(self):
        return tv.mobilenet_v3_small(num_classes=10)

    def example(self, size):
        return images(size, 48)


class TestMobileNetV3Large(SplitContract):
    def model(self):
        return tv.mobilenet_v3_large(num_classes=10)

    def example(self, size):
        return images(size, 48)


class TestVisionTransformer(SplitContract):
    def model(self):
        return tv.VisionTransformer(32, 8, 4, 4, 32, 64, dropout=0.1, attention_dropout=0.1, num_classes=10)

    def example(self, size):
        return images(size, 32)


class TestTransformersViT(SplitContract):
    def model(self):
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
        return ViTForImageClassification(config)

    def example(self, size):
        return {"pixel_values": images(size, 32)}


def test_vit_b_16_at_half():
    torch.manual_seed(0)
    model = tv.vit_b_16(image_size=32).eval()
    prefix, suffix = split(model, 0.5, images(2, 32))
    assert str(prefix.cut) == "encoder.layers.encoder_layer_6, after 6 of 12 blocks"
    with torch.no_grad():
        torch.testing.assert_close(
            recycle(prefix, suffix, images(3, 32)), call(model, images(3, 32)), rtol=0, atol=1e-6
        )
