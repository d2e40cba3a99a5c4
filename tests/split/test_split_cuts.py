"""A path, a number of blocks and a share of them name one place; a wrong name is answered with the nearest."""

import pytest
import timm
import torch
import torchvision.models as tv
from test_split_refusals import Chain
from test_split_text import ragged
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from pipeline.errors import NoSuchCutError, SplitError
from pipeline.split import candidates
from pipeline.split.blocks import find_blocks, resolve
from pipeline.split.forward import trace
from pipeline.split.tree import as_call

BERT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 100}


class Noisy(Chain):
    """Its third block is random, in eval mode too."""

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x) + (torch.randn(6) if number == 2 else 0)
        return self.head(x)


def images(pixels):
    return torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


MODELS = {
    "resnet18": (lambda: tv.resnet18(num_classes=10), images(32)),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=4), images(32)),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**BERT)), ragged(2)),
    "bare bert": (lambda: BertModel(BertConfig(**BERT), add_pooling_layer=False), ragged(2)),
    "own": (Chain, torch.randn(2, 6, generator=torch.Generator().manual_seed(0))),
    "sequence": (lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))), torch.randn(2, 6)),
}


def place(model, example, at):
    calls = trace(model, *as_call(example)).calls
    return resolve(model, at, calls, find_blocks(model, calls))


@pytest.mark.parametrize("name", MODELS)
def test_path_number_and_share_name_one_place(name):
    make, example = MODELS[name]
    torch.manual_seed(0)
    model = make()
    found = candidates(model, example)
    assert [item.refused for item in found] == [None] * len(found)
    assert len({item.cut for item in found}) == len(found) >= 4
    for number, item in enumerate(found):
        assert item.cut.blocks_before == number
        assert place(model, example, item.cut.share) == item.cut
        assert place(model, example, item.cut.name) == item.cut
        if number > 1:
            assert place(model, example, number) == item.cut
    with pytest.raises(NoSuchCutError, match=rf"2\.\.{len(found) - 1} \(a whole number of blocks\)"):
        place(model, example, len(found))
    assert place(model, example, 1) == found[-1].cut
    assert place(model, example, 0) == found[0].cut


def test_the_stage_of_a_network_is_where_its_first_block_is():
    model = tv.resnet18()
    assert place(model, images(32), "layer3") == place(model, images(32), "layer3.0") == place(model, images(32), 4)


def test_the_calls_of_one_layer_are_places():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 2)

        def forward(self, x):
            for _ in range(5):
                x = self.layer(x).tanh()
            return self.head(x)

    model, example = Loop(), torch.randn(2, 6)
    found = candidates(model, example)
    assert [item.cut.name for item in found] == ["", "layer#1", "layer#2", "layer#3", "layer#4", "head"]
    assert all(place(model, example, item.cut.name) == item.cut for item in found)


@pytest.mark.parametrize(
    ("at", "nearest"),
    [
        ("encoder.layer.2", "'bert.encoder.layer.2'"),
        ("bert.encoder.layers.3", "'bert.encoder.layer.3'"),
        ("clasifier", "'classifier'"),
        ("classifier#x", "'x' after # is no number of a call"),
        ("classifier#1", r"called 1 time\(s\) on the example; use 0..0"),
        (9, "outside 0..1 .* and 2..4 .*; the nearest is 'bert.pooler'"),
        (2.5, "outside 0..1 .*; the nearest is 'bert.encoder.layer.2'"),
        (-1, "outside 0..1 .*; the nearest is 0"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(at, nearest):
    make, example = MODELS["bert"]
    with pytest.raises(NoSuchCutError, match=nearest):
        place(make(), example, at)


def test_a_refused_place_is_listed_with_its_reason():
    found = candidates(Noisy(), torch.randn(2, 6))
    assert all("random" in item.refused for item in found)
    assert [(item.parameters, item.state_bytes) for item in found] == [(None, None)] * 9
    assert [item.flops for item in found] == [number * 72 for number in range(9)]


def test_a_batch_of_one_has_no_candidates():
    with pytest.raises(SplitError, match="at least 2"):
        candidates(Chain(), torch.randn(1, 6))
