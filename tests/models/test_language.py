"""Losses of language models, some tokens at a time, against those of the library; which tokens are counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import CONFIGS, WORDS, write_network
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from pipeline.encode.ragged import pad_batch
from pipeline.errors import BadSampleError, ModelError
from pipeline.models import Backbone, ModelConfig, PreprocessConfig, language, load
from pipeline.split import split
from pipeline.tasks import Head, TaskConfig, open_task

CONTENTS = [
    {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five"}]},
    {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("six", "one", "two", "ten"))]},  # noqa: B905
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "seven"}]},
]


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_network(tmp_path, request.param)
    return tmp_path


def opened(folder: Path, *, max_length: int | None = None, **head: Any) -> Backbone:
    return load(ModelConfig(backbone=f"hf:{folder}"), PreprocessConfig(max_length=max_length), Head("language", **head))


def batch_of(backbone: Backbone) -> dict[str, Tensor]:
    """The contents as one batch, of 11, 12 and 5 tokens."""
    return pad_batch([backbone.preprocess(content) for content in CONTENTS], backbone.preprocess.pad)


def reference(network: nn.Module, batch: dict[str, Tensor], *, on_all: bool) -> Tensor:
    """The library's own loss."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] < (0 if on_all else 1), -100)
    return network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: item.grad.clone() for name, item in module.named_parameters() if item.grad is not None}


def loss_of(output: Tensor) -> Tensor:
    return open_task(TaskConfig(kind="lm")).loss(output, {})


@pytest.mark.parametrize("on_all", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 100])
def test_losses_and_gradients_are_the_librarys(
    folder: Path, on_all: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = opened(folder, on_all=on_all)
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", tokens * len(WORDS))
    batch = batch_of(backbone)
    assert backbone.model.parts is not None
    expected = reference(backbone.network.eval(), batch, on_all=on_all)
    expected.backward()
    known = gradients(backbone.network)
    backbone.network.zero_grad()
    loss = loss_of(backbone.model(**batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(backbone.network)
    assert found.keys() == known.keys()
    for name, gradient in known.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("cut", [0.5, 1.0])
@pytest.mark.parametrize("untied", [False, True])
def test_suffixes_have_the_librarys_losses_and_gradients(folder: Path, cut: float, untied: bool) -> None:
    backbone = opened(folder, untied=untied)
    batch = batch_of(backbone)
    reference(backbone.network.eval(), batch, on_all=False).backward()
    known = {f"backbone.{name}": gradient for name, gradient in gradients(backbone.network).items()}
    backbone.network.zero_grad()
    prefix, suffix = split(backbone.model, at=cut, example=batch)
    loss_of(suffix.eval()(prefix(**batch), **batch)).backward()
    found = gradients(suffix)
    assert found
    is_own = untied or "llama" in str(backbone.network.config.model_type)
    assert any("lm_head" in name for name in found) == is_own
    for name, gradient in found.items():
        assert torch.allclose(gradient, known[name], rtol=1e-4, atol=1e-6), name


def test_logits_that_cannot_be_divided_are_computed_at_once(folder: Path) -> None:
    backbone = opened(folder)
    batch = batch_of(backbone)
    divided = backbone.model.eval()(**batch)
    whole = language.LanguageModel(backbone.network, None, on_all=False)(**batch)
    assert torch.allclose(divided, whole, atol=1e-5)
    likeliest = backbone.network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    right = likeliest[:, :-1] == batch["input_ids"][:, 1:]
    counted = divided[:, 1:, 2] == 1
    assert torch.equal((divided[:, 1:, 1] == 0)[counted], right[counted])


def test_losses_in_mixed_precision_are_close(folder: Path) -> None:
    backbone = opened(folder, untied=True)
    batch = batch_of(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(backbone.network.eval(), batch, on_all=False)
        loss = loss_of(backbone.model(**batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert backbone.network.get_output_embeddings().weight.grad.dtype == torch.float32


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_network(tmp_path, "llama")
    return tmp_path


def tokens(backbone: Backbone, content: object) -> tuple[list[str], list[str]]:
    """All tokens of a content, and those that the network is to write."""
    sample = backbone.preprocess(content)
    words = [WORDS[number] for number in sample["input_ids"].tolist()]
    return words, [word for word, mask in zip(words, sample["completion_mask"].tolist(), strict=True) if mask]


def test_the_tokens_that_are_trained_on(llama: Path) -> None:
    backbone = opened(llama)
    assert tokens(backbone, CONTENTS[0])[1] == ["four", " ", "five", "<end>"]
    whole = [
        "<user>",
        "six",
        "<end>",
        "<assistant>",
        "one",
        "<end>",
        "<user>",
        "two",
        "<end>",
        "<assistant>",
        "ten",
        "<end>",
    ]
    assert tokens(backbone, CONTENTS[1]) == (whole, ["one", "<end>", "ten", "<end>"])
    whole = ["one", " ", "two", " ", "three", "<end>"]
    assert tokens(backbone, ("one two", " three")) == (whole, whole[3:])
    assert tokens(backbone, "one two") == (["one", " ", "two", "<end>"],) * 2
    long = "one " * 40
    assert backbone.preprocess.excess(long, backbone.preprocess(long)) == 81 - 24
    assert "long_texts" not in backbone.preprocess.recipe()
    refusing = load(ModelConfig(backbone=f"hf:{llama}"), PreprocessConfig(long_texts="refuse"), Head("language"))
    assert refusing.preprocess.recipe()["long_texts"] == "refuse"
    assert refusing.preprocess.excess("one", refusing.preprocess("one")) == 0
    with pytest.raises(BadSampleError, match=r"81 tokens, and preprocess\.max_length is 24"):
        refusing.preprocess.excess(long, refusing.preprocess(long))


def test_a_turn_that_the_template_rewrites_is_not_trained_on(llama: Path) -> None:
    backbone = opened(llama)
    backbone.preprocess.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert tokens(backbone, CONTENTS[1])[1] == ["ten", "<end>"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (("one " * 30, "two"), "no token that the network is to write is within preprocess.max_length 24"),
        ({"messages": [{"role": "user", "content": "one"}]}, "no message of the role assistant"),
        ({"messages": "one"}, "expected a list of objects with a role"),
        ({"messages": [{"role": "assistant", "content": "one"}]}, "no message of the role assistant"),
        ("  ", "the text is empty"),
    ],
)
def test_contents_without_anything_to_write_are_refused(llama: Path, content: object, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        opened(llama).preprocess(content)


def test_a_network_that_looks_ahead_is_no_language_model(llama: Path) -> None:
    BertLMHeadModel(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(llama)
    with pytest.raises(ModelError, match="a token changes the logits of the tokens before it"):
        opened(llama)
    causal = ModelConfig(backbone=f"hf:{llama}", options={"is_decoder": True})
    assert load(causal, PreprocessConfig(), Head("language")).model.parts is None


def test_a_network_that_needs_more_than_token_ids_is_no_language_model(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> None:
        raise ValueError("inputs_embeds must be given")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", forward)
    with pytest.raises(ModelError, match=r"no logits for token ids alone.*inputs_embeds must be given"):
        opened(llama)
