"""What cannot be split exactly is refused, and the message says why."""

import pytest
import torch
from split_contract import recycle
from torch import nn

from pipeline.errors import NoSuchCutError, SplitError
from pipeline.split import Capture, forward, merge, split
from pipeline.split.tree import difference


class Chain(nn.Module):
    """Four layers, then a head."""

    def __init__(self, width=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(4))
        self.spare = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def between(self, x):
        return x

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = self.between(layer(x)) if number == 1 else layer(x)
        return self.head(x)


def batch(size=3):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("layer.2", r"module 'layer.2' does not exist; the nearest are .*'layers.2'"),
        ("spare", r"module 'spare' is never called on the example; the nearest are "),
        ("head#3", r"module 'head' is called 1 time\(s\) on the example; use 0..0"),
        (1.5, r"1.5 is outside 0..1"),
    ],
)
def test_a_cut_that_names_no_place(at, reason):
    with pytest.raises(NoSuchCutError, match=reason):
        split(Chain(), at, batch())


def test_a_batch_of_one_shows_no_batch_axis():
    with pytest.raises(SplitError, match="at least 2"):
        split(Chain(), 0.5, batch(1))


def test_a_prefix_that_is_random_in_eval():
    class Noisy(Chain):
        def between(self, x):
            return x + torch.randn(x.shape)

    with pytest.raises(SplitError, match="random in eval mode: state 'input' differs between two runs"):
        split(Noisy(), 0.5, batch())


def test_a_suffix_that_is_random_in_eval():
    class Noisy(Chain):
        def between(self, x):
            return x + torch.randn(x.shape)

    with pytest.raises(SplitError, match="the model is random there"):
        split(Noisy(), 0.25, batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_that_mixes_the_samples(dtype):
    class Mixing(Chain):
        def between(self, x):
            return x - x.mean(0)

    with pytest.raises(SplitError, match="depends on the other samples"):
        split(Mixing().to(dtype), 0.5, batch().to(dtype))


def test_a_batch_of_another_size_may_round_differently_within_its_type():
    class Rounding(Chain):
        def between(self, x):
            return x * (1 + torch.finfo(torch.bfloat16).eps * (len(x) % 2))

    split(Rounding().bfloat16(), 0.5, batch().bfloat16())
    with pytest.raises(SplitError, match="depends on the other samples"):
        split(Rounding(), 0.5, batch())


def test_a_prefix_whose_path_depends_on_values():
    class Branching(Chain):
        def between(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(SplitError, match="depends on the values of a recycled layer"):
        split(Branching(), 0.5, batch())


def test_a_state_of_another_cut():
    model = Chain()
    _, suffix = split(model, 0.5, batch())
    with pytest.raises(SplitError, match=r"the state holds \['hidden'\], the suffix .* takes \['input'\]"):
        suffix({"hidden": batch()}, batch())


def test_a_state_that_does_not_fit_the_inputs():
    prefix, suffix = split(Chain(), 0.5, batch())
    with pytest.raises(SplitError, match=r"state holds \(3, 6\) where these inputs lead to \(2, 6\)"):
        suffix(prefix(batch(3)), batch(2))


def test_merging_into_another_architecture():
    _, suffix = split(Chain(), 0.5, batch())
    with pytest.raises(SplitError, match=r"'layers.2.0.weight' does not fit"):
        merge(Chain(width=5), suffix)


def test_capture_takes_prefixes_of_one_model():
    with pytest.raises(SplitError, match="one and the same model"):
        Capture([split(Chain(), at, batch())[0] for at in (0.25, 0.5)])


def test_capture_gives_every_prefix_s_state_in_one_run():
    model = Chain().eval()
    pairs = [split(model, at, batch()) for at in (0.75, 0, "layers.1", 1.0)]
    run = Capture([prefix for prefix, _ in pairs])
    states = run(batch(5))
    assert [seconds > 0 for seconds in run.elapsed] == [True] * 4
    assert run.elapsed[1] < run.elapsed[2] < run.elapsed[0] < run.elapsed[3]
    for (prefix, suffix), state in zip(pairs, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in prefix(batch(5)).items())
        torch.testing.assert_close(suffix(state, batch(5)), recycle(prefix, suffix, batch(5)))


def test_the_time_to_a_cut_waits_for_an_accelerator_and_for_nothing_on_the_cpu(monkeypatch):
    waited = []
    prefix, _ = split(Chain(), 0.5, batch())
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for kind in ("cuda", "meta"):
        monkeypatch.setattr(forward, "ACCELERATOR", kind)
        Capture([prefix])(batch())
    assert not waited
    prefix.model.to("meta")  # stands for a device whose operations are queued
    Capture([prefix])(batch().to("meta"))
    assert waited == [torch.device("meta")]


def test_the_prefix_names_its_weights_and_modules():
    model = Chain()
    model.train()
    prefix, _ = split(model, 0.5, batch())
    prefix(batch())
    assert all(module.training for module in model.modules())
    expected = [f"layers.{block}.{layer}.{kind}" for block in (0, 1) for layer in (0, 1) for kind in ("bias", "weight")]
    assert list(prefix.weights()) == expected
    assert [path for path, _ in prefix.modules()] == [
        "",
        *(f"layers.{p}" for p in ("0", "0.0", "0.1", "1", "1.0", "1.1", "2")),
    ]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "found", "gap"),
    [
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, 2.0], [1.0, INF], INF),
        ([1.0, NAN, INF], [1.0, NAN, INF], 0.0),
        ([NAN, NAN], [NAN, NAN], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([1, 2], [1, 3], INF),
        ([1.0, 2.0], [[1.0, 2.0]], INF),
    ],
)
def test_a_value_that_is_not_finite_is_no_rounding(expected, found, gap):
    assert difference(torch.tensor(expected), torch.tensor(found)) == gap
