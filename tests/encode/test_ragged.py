"""Padding and trimming: what is stored is what a sample gives alone."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.encode.ragged import Trimming, batches_by_length, find_trimming, pad_batch

PAD = {"ids": 7, "mask": 0}


def sample(length: int) -> dict[str, Tensor]:
    ids = torch.arange(length) % 5
    return {"ids": ids, "mask": torch.ones(length, dtype=torch.int64)}


def test_pad_batch_fills_up_on_the_right() -> None:
    batch = pad_batch([sample(2), sample(4)], PAD)
    assert batch["ids"].tolist() == [[0, 1, 7, 7], [0, 1, 2, 3]]
    assert batch["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_pad_batch_pads_every_axis() -> None:
    batch = pad_batch([{"x": torch.ones(1, 3)}, {"x": torch.ones(2, 2)}], {})
    assert batch["x"].tolist() == [[[1, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]]]


@pytest.mark.parametrize(
    ("tokens", "pads", "expected"),
    [
        (None, True, [[1, 3, 0], [2, 4]]),  # three samples at most
        (None, False, [[1, 3], [0], [2, 4]]),
        (8, True, [[1, 3], [0], [2], [4]]),  # 2 * 2, then 3 * 5 positions would be too many
        (12, True, [[1, 3, 0], [2, 4]]),
        (1, True, [[1], [3], [0], [2], [4]]),
    ],
)
def test_batches_have_samples_of_similar_length(tokens: int | None, pads: bool, expected: list[list[int]]) -> None:
    samples = [sample(length) for length in (4, 2, 6, 2, 6)]
    assert list(batches_by_length(samples, size=3, tokens=tokens, pads=pads)) == expected


def test_samples_of_one_shape_need_no_trimming() -> None:
    assert find_trimming(lambda ids, mask: {"h": ids.float()}, [sample(3), sample(3)], PAD) == Trimming()


def test_a_state_of_the_inputs_length_is_trimmed_to_it() -> None:
    table = nn.Embedding(8, 4)

    def prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"hidden": table(ids).detach(), "pooled": (table(ids) * mask[..., None]).sum(1).detach()}

    samples = [sample(2), sample(5), sample(3)]
    trimming = find_trimming(prefix, samples, PAD)
    assert trimming == Trimming(axes={"hidden": (0, "ids")})
    trimmed = trimming(prefix(**pad_batch(samples, PAD)), samples)
    assert [one.shape[0] for one in trimmed["hidden"]] == [2, 5, 3]
    assert isinstance(trimmed["pooled"], Tensor)
    for i, alone in enumerate(samples):
        assert torch.equal(trimmed["hidden"][i], prefix(**pad_batch([alone], PAD))["hidden"][0])


def test_a_state_with_its_length_on_another_axis_is_trimmed_there() -> None:
    table = nn.Embedding(8, 4)
    trimming = find_trimming(lambda ids, mask: {"h": table(ids).detach().transpose(1, 2)}, [sample(2), sample(5)], PAD)
    assert trimming.axes == {"h": (1, "ids")}


def test_padding_that_leaks_is_not_used() -> None:
    table = nn.Embedding(8, 4)
    mean = find_trimming(lambda ids, mask: {"h": table(ids).mean(1).detach()}, [sample(2), sample(5)], PAD)
    spread = find_trimming(
        lambda ids, mask: {"h": (table(ids) + table(ids).mean(1, keepdim=True)).detach()}, [sample(2), sample(5)], PAD
    )
    assert not mean.pads
    assert not spread.pads


def test_rounding_within_the_tolerance_is_no_leak() -> None:
    table = nn.Embedding(8, 4)

    def prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"h": (table(ids) * (1 + 0.01 * (len(ids) - 1))).detach()}

    assert find_trimming(prefix, [sample(2), sample(5)], PAD, tolerance=0.02).pads
    assert not find_trimming(prefix, [sample(2), sample(5)], PAD).pads


def test_a_state_of_some_other_length_is_not_padded() -> None:
    table = nn.Embedding(8, 4)
    halved = find_trimming(lambda ids, mask: {"h": table(ids)[:, ::2].detach()}, [sample(2), sample(6)], PAD)
    squared = find_trimming(lambda ids, mask: {"h": (table(ids) @ table(ids).mT).detach()}, [sample(2), sample(6)], PAD)
    assert not halved.pads
    assert not squared.pads
