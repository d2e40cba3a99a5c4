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
