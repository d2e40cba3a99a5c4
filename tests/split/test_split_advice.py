"""Splits that are exact, and of which the user is told something."""

import warnings

import pytest
import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, FNetConfig, FNetModel, OPTConfig, OPTModel

from pipeline.split import candidates, split

SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 32, "vocab_size": 50}


def text(size=3):
    mask = (torch.arange(8) < torch.tensor([8, 5, 7])[:size, None]).long()
    return {
        "input_ids": torch.randint(1, 50, (size, 8), generator=torch.Generator().manual_seed(0)) * mask,
        "attention_mask": mask,
    }


def test_shared_layers_do_not_train():
    torch.manual_seed(0)
    model = AlbertModel(AlbertConfig(num_attention_heads=2, embedding_size=8, **SHAPE))
    told = r"after 2 of 4 blocks: the prefix and the suffix share layers .* only the 272 parameters of the rest"
    with pytest.warns(UserWarning, match=told):
        _, suffix = split(model, 0.5, text())
    assert {name.partition(".")[0] for name, _ in suffix.named_parameters()} == {"pooler"}


def test_a_state_that_depends_on_padding():
    torch.manual_seed(0)

    class Mixing(FNetModel):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids)

    with pytest.warns(UserWarning, match="depends on how far it is padded"):
        split(Mixing(FNetConfig(**SHAPE)), 0.5, text())


class TestLeftPadding:
    def example(self):
        right = text()
        return {name: tensor.flip(1) for name, tensor in right.items()}

    def test_positions_count_from_the_left_edge(self):
        torch.manual_seed(0)
        model = BertModel(BertConfig(num_attention_heads=2, **SHAPE))
        with pytest.warns(UserWarning, match=r"padded on the left; pad on the right"):
            split(model, 0.5, self.example())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split(model, 0.5, text())

    def test_positions_that_follow_the_mask_are_no_matter(self):
        torch.manual_seed(0)
        model = OPTModel(OPTConfig(num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16, use_cache=False, **SHAPE))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split(model, 0.5, self.example())


def test_candidates_tell_what_a_cut_costs():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10), torch.nn.Linear(10, 2)
    )
    found = candidates(model, torch.randn(2, 3, 8, 8))
    assert [(place.cut.name, place.cut.share) for place in found] == [("", 0.0), ("2", 0.5), ("3", 1.0)]
    assert [place.parameters for place in found] == [0, 112, 112 + 1450]
    assert [place.state_bytes for place in found] == [2 * 192, 2 * 144, 2 * 10]
    assert [place.flops for place in found] == [0, 2 * 36 * 4 * 27, 2 * 36 * 4 * 27 + 2 * 144 * 10]
