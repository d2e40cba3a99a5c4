"""Stacks of recurrent layers, packed sequences, and operations whose arguments must be real."""

import pytest
import torch
from split_contract import SplitContract, recycle
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from pipeline.errors import SplitError
from pipeline.split import split

pytestmark = pytest.mark.slow

LENGTHS = torch.tensor([5, 7, 3, 6])


def texts(size):
    """Token ids of different lengths, padded on the right with 0, and the lengths."""
    lengths = LENGTHS[:size]
    drawn = torch.randint(1, 20, (size, 7), generator=torch.Generator().manual_seed(size))
    return drawn * (torch.arange(7) < lengths[:, None]), lengths


class Recurrent(nn.Module):
    """An embedding, two recurrent layers, a layer between them and the head; subclasses say how they are joined."""

    def __init__(self, cell=nn.LSTM, *, batch_first=True, bidirectional=False):
        super().__init__()
        width = 16 if bidirectional else 8
        options = {"batch_first": batch_first, "bidirectional": bidirectional}
        self.embed, self.batch_first = nn.Embedding(20, 8), batch_first
        self.first, self.second = cell(8, 8, **options), cell(width, 8, **options)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 3)


class Contract(SplitContract):
    cuts = ("second", "mix", "head")

    def example(self, size):
        return texts(size)


class Stacked(Recurrent):
    """One layer after the other; the second goes on from the hidden state of the first."""

    def forward(self, ids, lengths):
        x = self.embed(ids) if self.batch_first else self.embed(ids).transpose(0, 1)
        x, hidden = self.first(x)
        x, _ = self.second(x, hidden)
        return self.head(self.mix(x).mean(1 if self.batch_first else 0))


class TestLSTM(Contract):
    model = Stacked


class TestGRU(Contract):
    def model(self):
        return Stacked(nn.GRU)


class TestBidirectionalGRU(Contract):
    def model(self):
        return Stacked(nn.GRU, bidirectional=True)


class TestTimeFirst(Contract):
    def model(self):
        return Stacked(nn.LSTM, batch_first=False, bidirectional=True)


class TestPlainRNN(Contract):
    def model(self):
        return Stacked(nn.RNN)


class Packed(Recurrent):
    """The first layer runs on a packed sequence, the second on a padded one that is packed again."""

    cuts = ("mix", "head")

    def forward(self, ids, lengths):
        x = self.packed(self.embed(ids), lengths)
        x, hidden = self.first(x)
        x, _ = pad_packed_sequence(x, batch_first=True, total_length=7)
        x = self.mix(x)
        x = pack_padded_sequence(x, (ids > 0).sum(1).cpu(), batch_first=True, enforce_sorted=False)
        x, hidden = self.second(x, hidden)
        x, lengths = pad_packed_sequence(x, batch_first=True, padding_value=-1.0)
        last = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(x.sum(1) / lengths[:, None] + last.transpose(0, 1).flatten(1))

    def packed(self, x, lengths):
        return pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)


class TestPackedLSTM(Contract):
    cuts = ("mix", "head")
    model = Packed

    def test_the_state_is_padded(self):
        prefix, _ = split(self.model().eval(), "mix", texts(2))
        assert {name: spec.shape for name, spec in prefix.spec.items()} == {
            "input": (7, 8),
            "first.out.1.0": (1, 8),
            "first.out.1.1": (1, 8),
        }


class TestPackedBidirectionalGRU(Contract):
    cuts = ("mix", "head")

    def model(self):
        return Packed(nn.GRU, bidirectional=True)


class TestPackedFromAList(Contract):
    cuts = ("head",)

    class Model(Packed):
        def packed(self, x, lengths):
            rows = [row[:length] for row, length in zip(x, lengths.tolist(), strict=True)]
            return pack_sequence(rows, enforce_sorted=False)

    model = Model


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_packed_rows_are_no_state_of_a_sample(cell):
    with pytest.raises(SplitError, match=r"state 'input.0' is \(12, 8\) for 2 samples and \(19, 8\) for 3: no single"):
        split(Packed(cell).eval(), "first", texts(2))


class Layers(nn.Module):
    """What `change` does to a recycled value, in the model's own forward or, `enclosed`, in a module of its own."""

    class Change(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def forward(self, x, ids, lengths):
            return self.change(x, ids, lengths)

    def __init__(self, change, *, enclosed):
        super().__init__()
        self.embed, self.late, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.middle = self.Change(change) if enclosed else change

    def forward(self, ids, lengths):
        return self.head(self.late(self.middle(self.embed(ids), ids, lengths)).tanh())


def written(x):
    """A view of a view whose sizes change in place, and through which is written."""
    whole = x * 1
    view = whole.unsqueeze(0)
    view.squeeze_(0).add_(1)
    return whole + view


def rows_of(x, lengths):
    return [row[:length] for row, length in zip(x, lengths.tolist(), strict=True)]


REAL = {
    "item": lambda x, ids, lengths: x[:, : lengths.max().item()],
    "tolist": lambda x, ids, lengths: torch.stack([row.mean(0) for row in rows_of(x, lengths)]),
    "numpy": lambda x, ids, lengths: x * torch.from_numpy((ids.numpy() > 0)[..., None]),
    "bincount": lambda x, ids, lengths: x * torch.stack([row.bincount(minlength=8)[:8] for row in ids])[:, None],
    "tensor_split": lambda x, ids, lengths: torch.stack(
        [part.mean(0) for part in torch.tensor_split(x.flatten(0, 1), torch.arange(1, len(ids)) * 7)]
    ),
    "repeat_interleave": lambda x, ids, lengths: x.repeat_interleave(torch.ones(7, dtype=torch.long) * 2, 1),
    "nonzero": lambda x, ids, lengths: x.flatten(0, 1)[(ids >= 0).flatten().nonzero()[:, 0]].view_as(x),
    "mask": lambda x, ids, lengths: torch.stack([part.mean(0) for part in x[ids > 0].split(lengths.tolist())]),
    "masked_select": lambda x, ids, lengths: x.masked_select((ids >= 0)[..., None]).view_as(x),
    "pad_sequence": lambda x, ids, lengths: pad_sequence(rows_of(x, lengths), batch_first=True, padding_value=0.5),
    "transpose_": lambda x, ids, lengths: (x * 1).transpose_(0, 1).mean(0),
    "squeeze_": lambda x, ids, lengths: written(x),
}


@pytest.mark.parametrize("enclosed", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_values_of_the_example_are_there_before_the_cut(name, enclosed):
    torch.manual_seed(0)
    model = Layers(REAL[name], enclosed=enclosed).eval()
    prefix, suffix = split(model, "late", texts(4))
    for size in (2, 3):
        if name != "pad_sequence" or size == 3:  # as long as its longest row: the example's two are 7 and 3 long
            torch.testing.assert_close(recycle(prefix, suffix, texts(size)), model(*texts(size)), rtol=0, atol=0)


RECYCLED = {
    "item": (lambda x, ids, lengths: x * x.max().item(), "_local_scalar_dense"),
    "tolist": (lambda x, ids, lengths: x * x.flatten().tolist()[0], "Tensor.tolist"),
    "numpy": (lambda x, ids, lengths: x * torch.from_numpy(x.detach().numpy()), "Tensor.numpy"),
    "bincount": (lambda x, ids, lengths: x * x.argmax(-1).flatten().bincount(minlength=8), "bincount"),
    "repeat_interleave": (lambda x, ids, lengths: x.repeat_interleave((x[0, :, 0] > 9).long() + 1, 1), "interleave"),
    "nonzero": (lambda x, ids, lengths: x * len(x.nonzero()), "nonzero"),
    "mask": (lambda x, ids, lengths: x * x[x > 0].sum(), "index.Tensor"),
    "a real tensor": (lambda x, ids, lengths: torch.zeros(x.shape).copy_(x), "copy_.* by new_zeros or zeros_like"),
}


@pytest.mark.parametrize("name", RECYCLED)
def test_values_of_recycled_layers_are_not_and_the_message_names_the_operation(name):
    change, operation = RECYCLED[name]
    with pytest.raises(SplitError, match=rf"{operation}.*\(met in the model's forward\)"):
        split(Layers(change, enclosed=False).eval(), "late", texts(4))


def test_a_module_that_cannot_be_seen_from_outside_is_named_with_the_operation():
    change, _ = RECYCLED["repeat_interleave"]
    with pytest.raises(SplitError, match=r"module 'middle' depends on values and returns .*repeat_interleave.Tensor"):
        split(Layers(lambda *given: change(*given)[:, :5], enclosed=True).eval(), "late", texts(4))


def test_a_recycled_value_that_goes_out_of_torch_after_the_cut_is_stored():
    class Read(Layers):
        def forward(self, ids, lengths):
            x = self.middle(self.embed(ids), ids, lengths)
            y = self.late(x)
            return self.head(y) * torch.tensor(x.tolist())[..., :3] + torch.from_numpy(x.detach().numpy())[..., :3]

    model = Read(lambda x, ids, lengths: x * 2, enclosed=True).eval()
    prefix, suffix = split(model, "head", texts(4))
    torch.testing.assert_close(recycle(prefix, suffix, texts(3)), model(*texts(3)), rtol=0, atol=0)
    prefix, suffix = split(model, "late", texts(4))
    torch.testing.assert_close(recycle(prefix, suffix, texts(3)), model(*texts(3)), rtol=0, atol=0)
