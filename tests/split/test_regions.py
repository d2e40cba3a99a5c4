"""Blocks that are recomputed in the backward pass, or compiled, give the same values; others are left as they are."""

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertForSequenceClassification

from pipeline.split import Suffix, compile_blocks, recompute_blocks, split
from pipeline.split.regions import Recomputed

IDS = torch.arange(24).reshape(4, 6) % 10


@pytest.fixture
def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 6}
    return BertForSequenceClassification(BertConfig(vocab_size=10, max_position_embeddings=8, **sizes))


def step(suffix: Suffix, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return the loss of a training step with dropout, the gradients, and the bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    suffix.train().zero_grad()
    torch.manual_seed(5)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = suffix(state, input_ids=IDS).logits.square().sum()
    loss.backward()
    return (
        loss,
        {name: item.grad for name, item in suffix.named_parameters() if item.grad is not None},
        sum(kept.values()),
    )


@pytest.mark.parametrize(("at", "blocks"), [(0, 6), (0.5, 3), ("bert.encoder.layer.3.output", 2)])
def test_recomputed_blocks_keep_less_and_give_the_same_gradients(bert: nn.Module, at: float | str, blocks: int) -> None:
    prefix, suffix = split(bert, at=at, example={"input_ids": IDS})
    state = prefix(input_ids=IDS)
    loss, gradients, kept = step(suffix, state)
    assert recompute_blocks(suffix) == blocks
    assert recompute_blocks(suffix) == blocks, "a second time, nothing changes"
    again, same, less = step(suffix, state)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())
    assert gradients.keys() == same.keys()
    assert less < 0.6 * kept
    with torch.no_grad():
        assert torch.equal(suffix.eval()(state, input_ids=IDS).logits, bert.eval()(input_ids=IDS).logits)


def test_blocks_that_count_batches_are_not_recomputed() -> None:
    model, images = tiny.ConvNet(3), torch.randn(4, 3, 8, 8)
    _, suffix = split(model, at=0.5, example={"x": images})
    assert recompute_blocks(suffix) == 0
    assert not any(isinstance(module.forward, Recomputed) for module in suffix.modules())


@pytest.mark.slow
def test_compiled_blocks_give_the_states_of_plain_ones(bert: nn.Module) -> None:
    places = [0.5, "bert.encoder.layer.4.output"]
    prefixes = [split(bert, at=at, example={"input_ids": IDS})[0] for at in places]
    plain = [prefix(input_ids=IDS) for prefix in prefixes]
    assert compile_blocks(prefixes) == 4, "a cut lies in the fifth"
    compiled = [module.forward for module in bert.bert.encoder.layer]
    assert compile_blocks(prefixes) == 4
    assert [module.forward for module in bert.bert.encoder.layer] == compiled, "a second time, nothing changes"
    for length in (6, 3, 5):
        for prefix, state in zip(prefixes, plain, strict=True):
            found = prefix(input_ids=IDS[:, :length])
            if length == 6:
                assert all(torch.allclose(found[name], item, atol=1e-5) for name, item in state.items())
            assert all(item.shape[1] == length for item in found.values())
