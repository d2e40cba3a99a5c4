"""Modules as users write them: what must be stored is discovered, whatever their forward does."""

from dataclasses import dataclass

import pytest
import torch
from split_contract import SplitContract, recycle
from torch import Tensor, nn

from pipeline.split import split


def layer(width=8):
    return nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3), nn.Tanh())


def rows(size, *shape):
    return torch.randn(size, *(shape or (8,)), generator=torch.Generator().manual_seed(size))


class Three(nn.Module):
    """Three layers and a head; subclasses say how they are joined."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = layer(), layer(), layer(), nn.Linear(8, 3)


class OwnContract(SplitContract):
    cuts = (0, "b", "c", "head")

    def example(self, size):
        return rows(size)


class TestSkipConnection(OwnContract):
    class Model(Three):
        def forward(self, x):
            first = self.a(x)
            return self.head(self.c(self.b(first) * 2) + first.relu() * 0.5)

    model = Model

    def test_stores_the_output_it_skips_from(self):
        prefix, _ = split(self.Model().eval(), "c", rows(2))
        assert set(prefix.spec) == {"input", "a.out"}


class TestResidualInTheCaller(OwnContract):
    """The caller goes on with the very tensor that it gave to the cut call, and that no module made."""

    class Model(Three):
        def forward(self, x):
            x = x * 2
            for block in (self.a, self.b, self.c):
                x = x + block(x)
            return self.head(x)

    model = Model


class TestDictOutput(OwnContract):
    class Model(Three):
        def forward(self, x):
            deep = self.c(self.b(self.a(x)))
            return {"logits": self.head(deep), "extra": [deep, {"sum": deep.sum(-1)}]}

    model = Model


class TestOutputOfThePrefix(OwnContract):
    """What the model returns from before the cut is part of the state."""

    class Model(Three):
        def forward(self, x):
            early = self.a(x)
            return self.head(self.c(self.b(early))), early

    model = Model


@dataclass
class Answer:
    scores: Tensor
    hidden: tuple[Tensor, ...]


class TestDataclasses(OwnContract):
    class Model(Three):
        class Wrap(nn.Module):
            def forward(self, x):
                return Answer(x, (x * 2, x.sin()))

        def __init__(self):
            super().__init__()
            self.wrap = self.Wrap()

        def forward(self, x):
            middle = self.wrap(self.a(x))
            return Answer(self.head(self.c(self.b(middle.scores) + middle.hidden[1])), ())

    model = Model


class TestSeveralInputs(OwnContract):
    class Model(Three):
        def forward(self, x, scale, ids, *, shift: float = 0.0, names=("left", "right")):
            x = self.b(self.a(x)) * scale + shift
            return self.head(self.c(x)) + ids[:, None] + len(names)

    model = Model

    def example(self, size):
        return {"x": rows(size), "scale": rows(size, 1), "ids": torch.arange(size), "shift": 0.5, "names": ("a",)}


class TestPositionalInputs(OwnContract):
    class Model(Three):
        def forward(self, x, mask, deep=None, double=False):
            x = self.c(self.b(self.a(x) * mask[:, None]))
            return self.head(x * 2 if double else x) * mask[:, None]

    model = Model

    def example(self, size):
        return rows(size), torch.tensor([1, 0, 1])[:size], None, True


class TestControlFlowOnShapes(OwnContract):
    class Model(Three):
        def forward(self, x):
            x = self.a(x)
            if x.shape[-1] == 8 and x.dtype == torch.float32 and x.dim() == 3:
                x = x.flatten(0, 1)
            x = self.b(x)
            for _ in range(x.shape[-1] // 4):
                x = self.c(x)
            return self.head(x).unflatten(0, (-1, 5)).mean(1)

    model = Model

    def example(self, size):
        return rows(size, 5, 8)

    def test_rows_that_share_the_batch_axis_are_kept_by_sample(self):
        prefix, _ = split(self.Model().eval(), "b", self.example(2))
        assert prefix.spec["input"].shape == (5, 8)


class TestBatchAxisSecond(OwnContract):
    class Model(Three):
        def forward(self, x):
            return self.head(self.c(self.b(self.a(x.transpose(0, 1))))).transpose(0, 1)

    model = Model

    def example(self, size):
        return rows(size, 5, 8)


class TestInPlaceAtTheCut(OwnContract):
    class Model(Three):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
            self.c = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))

        def forward(self, x):
            x = self.a(x * 1)
            skip = x
            x = self.b(x)
            x += skip
            return self.head(self.c(x))

    model = Model

    def test_the_caller_s_state_is_left_as_it_is(self):
        for at in self.cuts:
            prefix, suffix = split(self.Model().eval(), at, rows(2))
            state = prefix(rows(2))
            copies = {name: tensor.clone() for name, tensor in state.items()}
            suffix(state, rows(2))
            assert all(torch.equal(state[name], copies[name]) for name in copies)


class TestMaskedRows(OwnContract):
    """A mask made from integer inputs tells the shape of what it selects."""

    class Model(Three):
        def forward(self, x, ids):
            x = self.b(self.a(x))
            return self.head(self.c(x[ids == 2]))

    model = Model
    cuts = (0, "b", "head")

    def example(self, size):
        return rows(size, 3, 8), torch.tensor([[1, 2, 3], [2, 1, 1], [1, 1, 2]])[:size]


class TestExperts(OwnContract):
    """A layer that goes by values cannot run on phantoms; it is seen from outside."""

    class Model(Three):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

            def forward(self, x):
                out = torch.zeros_like(x)
                for number, expert in enumerate(self.experts):
                    chosen = (x[:, 0] > 0) == bool(number)
                    out[chosen] = expert(x[chosen])
                return out if x.isfinite().all() else x

        def __init__(self):
            super().__init__()
            self.a = self.Experts()

        def forward(self, x):
            return self.head(self.c(self.b(self.a(x))))

    model = Model


@pytest.mark.filterwarnings("ignore:split at .* share layers")
class TestModuleCalledTwice(OwnContract):
    cuts = (0, "b", "a#1", "head")

    class Model(Three):
        def forward(self, x):
            return self.head(self.a(self.b(self.a(x))))

    model = Model


class TestModulesCalledAsFunctions(OwnContract):
    """`forward` called directly fires no hook, and a weight may be used without its module."""

    cuts = (0, "c", "head")

    class Model(Three):
        def forward(self, x):
            x = self.b.forward(self.a.forward(x))
            return self.head(nn.functional.linear(self.c(x), self.b[0].weight, self.a[0].bias))

    model = Model


class TestListsOfTensors(OwnContract):
    """Features of several depths go into one list, which later modules take whole."""

    class Model(Three):
        class Gather(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = nn.Linear(24, 8)

            def forward(self, features):
                return [self.mix(torch.cat(features, -1)), *features[1:]]

        def __init__(self):
            super().__init__()
            self.gather = self.Gather()

        def forward(self, x):
            features = [x]
            for module in (self.a, self.b):
                features.append(module(features[-1]))
            features = self.gather(features)
            return [self.head(self.c(features[0])), features[1:]]

    model = Model
    cuts = (0, "b", "gather", "c", "head")


class TestNonTensorArguments(OwnContract):
    """Numbers, words, flags and None are part of a call as they are."""

    class Model(Three):
        def forward(self, x, power, *, mode="plain", scale=None, options=None):
            x = self.b(self.a(x)) ** power
            x = x * (options or {}).get("gain", 1.0) if scale is None else x * scale
            return self.head(self.c(x)) if mode == "plain" else self.head(x)

    model = Model

    def example(self, size):
        return {"x": rows(size), "power": 2, "mode": "plain", "scale": None, "options": {"gain": 0.5, "name": "n"}}

    def test_other_arguments_lead_another_way(self):
        model = self.Model().eval()
        prefix, suffix = split(model, "c", self.example(2))
        other = {**self.example(2), "power": 3, "scale": 2.0}
        torch.testing.assert_close(suffix(prefix(**other), **other), model(**other))


class TestBuffersChangedInForward(OwnContract):
    """A counter and a running mean, before and after the cut: only those after it move."""

    class Model(Three):
        class Mean(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.zeros(8))
                self.register_buffer("steps", torch.zeros((), dtype=torch.long))

            def forward(self, x):
                if self.training:
                    self.steps += 1
                    self.mean = self.mean + 0.1 * (x.detach().mean(0) - self.mean)
                return x - self.mean

        def __init__(self):
            super().__init__()
            self.early, self.late = self.Mean(), self.Mean()

        def forward(self, x):
            return self.head(self.late(self.c(self.b(self.early(self.a(x))))))

    model = Model
    cuts = (0, "b", "c", "late", "head")


class TestConstantOfTheModel(OwnContract):
    """A value without a batch axis belongs to no sample: the suffix holds it."""

    class Model(Three):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 8))
            self.b = self.Shifted()

        class Shifted(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x, table):
                return self.linear(x) @ table

        def forward(self, x):
            table = self.a(self.table)
            return self.head(self.c(self.b(x, table)))

    model = Model

    def test_it_is_not_in_the_state(self):
        prefix, _ = split(self.Model().eval(), "b", rows(2))
        assert set(prefix.spec) == {"x"}


def test_float_inputs_may_be_stand_ins():
    torch.manual_seed(0)
    prefix, suffix = split(TestSkipConnection.Model().eval(), "c", rows(2))
    stand_in = torch.zeros(()).expand(2, 8)
    torch.testing.assert_close(suffix(prefix(rows(2)), stand_in), recycle(prefix, suffix, rows(2)), rtol=0, atol=0)


def test_state_takes_the_dtype_the_model_has_at_the_cut():
    prefix, suffix = split(TestSkipConnection.Model().eval(), "c", rows(2))
    half = {name: tensor.half() for name, tensor in prefix(rows(2)).items()}
    assert suffix(half, rows(2)).dtype == torch.float32
    assert suffix.double()(half, rows(2)).dtype == torch.float64
