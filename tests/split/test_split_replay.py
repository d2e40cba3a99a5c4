"""A suffix gets to its cut with inputs of any kind, or says why not, and survives what is done to modules."""

import copy

import pytest
import torch
import torchvision.models as tv
from accelerate import Accelerator
from split_contract import call, gradients, loss, recycle
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from pipeline.errors import InputRefusedError, SplitError
from pipeline.split import split


def text(size, length, padded=True):
    words = torch.randint(1, 50, (size, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(words)
    if padded:
        mask[0, length // 2 :] = 0
    return {"input_ids": words * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config).eval()
    return model, *split(model, 0.5, text(2, 8))


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    model = tv.resnet18(num_classes=4).eval()
    return images, *split(model, "layer3", images)


@pytest.mark.parametrize("length", [5, 8, 13])
@pytest.mark.parametrize("padded", [False, True])
def test_batches_of_any_length_and_mask(bert, length, padded):
    model, prefix, suffix = bert
    batch = text(3, length, padded)
    with torch.no_grad():
        found, expected = recycle(prefix, suffix, batch), call(model, batch)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-6)


def test_what_is_cheap_to_recompute_is_not_stored():
    """T5 makes its position bias in the first block, from a table and the mask: quadratic in the length."""
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    batch = {**text(2, 8), "labels": text(2, 8)["input_ids"]}
    prefix, suffix = split(model, "encoder.block.2", batch)
    assert set(prefix.spec) == {"hidden_states"}
    batch = {**text(3, 11), "labels": text(3, 5)["input_ids"]}
    torch.testing.assert_close(recycle(prefix, suffix, batch).loss, call(model, batch).loss, rtol=1e-6, atol=0)


class Body(nn.Module):
    """Subclasses say what runs before `body`, where the tests cut."""

    def __init__(self):
        super().__init__()
        self.long, self.short, self.early = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, **options):
        return self.head(self.body(self.before(x, **options).relu()))


class Forked(Body):
    """Goes by the length of a sequence."""

    def before(self, x):
        return (self.long if x.shape[1] > 4 else self.short)(x)


class Loop(Body):
    """Calls a layer once per place of a sequence."""

    def before(self, x):
        state = self.early(x[:, 0])
        for place in range(1, x.shape[1]):
            state = self.early(x[:, place] + state.tanh())
        return state


class Optional(Body):
    """Calls one layer more where it is asked to."""

    def before(self, x, deep=False):
        x = self.early(x)
        return self.long(x.tanh()) if deep else x


@pytest.mark.parametrize("kind", [Forked, Loop])
@pytest.mark.parametrize("lengths", [(7, 3, 9), (3, 7, 2)])
def test_other_calls_before_the_cut_for_another_length(kind, lengths):
    torch.manual_seed(0)
    model = kind().eval()
    prefix, suffix = split(model, "body", torch.randn(2, 6, 4))
    for length in (*lengths, 6):
        batch = torch.randn(3, length, 4)
        with torch.no_grad():
            torch.testing.assert_close(recycle(prefix, suffix, batch), model(batch), rtol=0, atol=1e-6)
        suffix.train().zero_grad()
        model.zero_grad()
        loss(recycle(prefix, suffix, batch)).backward()
        loss(model(batch)).backward()
        for name, gradient in gradients(suffix).items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_other_calls_before_the_cut_while_dropout_trains():
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(2, 4)
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    prefix, suffix = split(model, "body", x)
    state = prefix(x, deep=True)
    torch.manual_seed(1)
    found = suffix.train()(state, x, deep=True)
    model.train()
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x, deep=True), rtol=0, atol=1e-6)


def test_other_calls_before_the_cut_for_another_option():
    torch.manual_seed(0)
    model, x = Optional().eval(), torch.randn(2, 4)
    prefix, suffix = split(model, "body", x)
    for deep in (True, False, True):
        state = prefix(x, deep=deep)
        torch.testing.assert_close(suffix(state, x, deep=deep), model(x, deep=deep), rtol=0, atol=1e-6)


def test_code_before_the_cut_that_fails_on_dummies_is_refused():
    class Writing(Body):
        """Writes in place into what a recycled layer returned, on request."""

        def before(self, x, write=False):
            x = self.early(x)
            return x.mul_(2) if write else x

    model, x = Writing().eval(), torch.randn(2, 4)
    prefix, suffix = split(model, "body", x)
    torch.testing.assert_close(recycle(prefix, suffix, x), model(x))
    with pytest.raises(
        SplitError, match=r"before the cut body.* fails with dummies .* split with an example of this kind"
    ):
        suffix(prefix(x, write=True), x, write=True)
    torch.testing.assert_close(recycle(prefix, suffix, x), model(x))
    prefix, suffix = split(model, "body", {"x": x, "write": True})
    torch.testing.assert_close(suffix(prefix(x, write=True), x, write=True), model(x, write=True))


def test_other_calls_that_cannot_be_replayed_are_refused():
    class Remembering(Body):
        """Returns what another layer made in the call before, on request: a value that no call before the cut makes."""

        def before(self, x, deep=False):
            x = self.early(x)
            if deep:
                self.kept = self.long(x)
            return x

        def forward(self, x, deep=False):
            output = self.head(self.body(self.before(x, deep).relu()))
            return output + self.kept[:, :2] if deep else output

    model, x = Remembering().eval(), torch.randn(2, 4)
    prefix, suffix = split(model, "body", x)
    with pytest.raises(SplitError, match=r"reads a value of a recycled layer .* did not read on the example"):
        suffix(prefix(x, deep=True), x, deep=True)
    torch.testing.assert_close(recycle(prefix, suffix, x), model(x))


def test_a_state_whose_shape_depends_on_values_of_the_inputs():
    class Trimming(Body):
        """Drops padding that no sample of the batch needs."""

        def before(self, x, lengths):
            return self.early(x)[:, : int(lengths.max())]

    model, x = Trimming().eval(), torch.randn(2, 6, 4)
    prefix, suffix = split(model, "body", {"x": x, "lengths": torch.tensor([5, 6])})
    for longest in (4, 6, 2):
        inputs = {"x": x, "lengths": torch.tensor([2, longest])}
        torch.testing.assert_close(suffix(prefix(**inputs), **inputs), model(**inputs), rtol=0, atol=1e-6)
    with pytest.raises(SplitError, match=r"the state holds .* where these inputs lead to"):
        suffix(prefix(x=x, lengths=torch.tensor([2, 3])), x=x, lengths=torch.tensor([2, 5]))


def test_an_output_that_its_caller_changes_after_the_cut():
    class Tower(Body):
        def before(self, x):
            return {"hidden": self.early(x), "pooled": None}

        def forward(self, x):
            return self.before(x)

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.project = Tower(), nn.Linear(4, 2)

        def forward(self, x):
            output = self.tower(x)
            output["pooled"] = self.project(output["hidden"][:, 0])
            return output

    model, x = Changing().eval(), torch.randn(2, 3, 4)
    prefix, suffix = split(model, "project", x)
    assert set(prefix.spec) == {"input", "tower.out.hidden"}
    for size in (2, 3):
        batch = torch.randn(size, 3, 4)
        found, expected = recycle(prefix, suffix, batch), model(batch)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["pooled"], expected["pooled"])
        torch.testing.assert_close(found["hidden"], expected["hidden"])


def test_a_stored_output_that_is_returned_twice():
    class Twice(Body):
        class Tower(nn.Linear):
            def forward(self, x):
                hidden = super().forward(x)
                return {"last": hidden, "all": (x, hidden)}

        def __init__(self):
            super().__init__()
            self.tower = self.Tower(4, 4)

        def forward(self, x):
            output = self.tower(x)
            return {"head": self.head(self.body(output["last"].relu())), **output}

    model, x = Twice().eval(), torch.randn(2, 4)
    prefix, suffix = split(model, "body", x)
    found, expected = recycle(prefix, suffix, x), model(x)
    for name in ("head", "last"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    for ours, theirs in zip(found["all"], expected["all"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_inputs_that_the_model_fails_on_before_the_cut_are_refused(bert):
    _, prefix, suffix = bert
    state = prefix(**text(2, 8))
    with pytest.raises(InputRefusedError, match=r"fails in eval mode with .* its inputs are input_ids"):
        suffix(state, input_ids=text(2, 8)["input_ids"].float()[0, 0], attention_mask=text(2, 8)["attention_mask"])


def test_a_buffer_that_is_made_of_recycled_values_before_the_cut_is_refused():
    class Averaging(Body):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def before(self, x):
            x = self.early(x)
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x

    with pytest.raises(
        SplitError, match="does not reproduce the full model: buffer 'mean' differs from the full model"
    ):
        split(Averaging(), "body", torch.randn(2, 4))


def test_a_counter_of_runs_in_the_prefix_is_no_obstacle():
    class Counted(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("runs", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.runs += 1
            return super().forward(x)

    model = Body()
    model.before = model.early = Counted()
    prefix, suffix = split(model, "body", torch.randn(2, 4))
    batch = torch.randn(3, 4)
    torch.testing.assert_close(recycle(prefix, suffix, batch), model(batch))
    assert "early.runs" not in suffix.state_dict()


def test_a_network_that_does_something_else_in_each_run_is_refused():
    class Counting(Body):
        """Changes its output in train mode by a number that it counts outside of its buffers."""

        runs = 0

        def before(self, x):
            return self.early(x)

        def forward(self, x):
            output = super().forward(x)
            Counting.runs += self.training
            return output * (1 + Counting.runs * self.training)

    with pytest.raises(SplitError, match=r"does not reproduce the full model: output .* in train mode"):
        split(Counting(), "body", torch.randn(2, 4))


def test_a_frozen_weight_that_was_never_expected_cannot_pass_unseen(resnet):
    _, _, suffix = resnet
    assert torch.isnan(suffix.root.conv1.weight).all()
    assert suffix.root.conv1.weight.untyped_storage().nbytes() == 4


def test_a_copy_trains_on_its_own(resnet):
    images, prefix, suffix = resnet
    twin = copy.deepcopy(suffix).train()
    state = prefix(images)
    loss(twin(state, images)).backward()
    assert gradients(twin)
    assert not gradients(suffix)
    assert twin.root.conv1.weight.untyped_storage().nbytes() == 4
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(suffix.parameters()).any()


def test_moves_to_another_dtype_and_back(resnet):
    images, prefix, suffix = resnet
    state = prefix(images)
    expected = suffix(state, images)
    double = suffix.double()(state, images)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(suffix.float()(state, images), expected, rtol=0, atol=0)


def test_goes_to_the_meta_device_without_memory(resnet):
    _, _, suffix = resnet
    suffix.to("meta")
    assert all(parameter.is_meta for parameter in suffix.parameters())
    assert suffix.root.conv1.weight.is_meta


def test_autocast_is_part_of_the_signature(bert):
    model, prefix, suffix = bert
    batch = text(2, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = recycle(prefix, suffix, batch), call(model, batch)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=2e-2)


def test_accelerate_prepares_it(resnet):
    images, prefix, suffix = resnet
    optimizer = torch.optim.AdamW(suffix.parameters(), lr=1e-3)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(suffix, optimizer)
    prepared.train()
    state = prefix(images)
    before = {name: item.clone() for name, item in prepared.state_dict().items()}
    accelerator.backward(loss(prepared(state, images)))
    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    optimizer.step()
    after = accelerator.unwrap_model(prepared).state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert all(torch.equal(item, state[name]) for name, item in prefix(images).items())


def test_gradient_checkpointing_gives_the_same_gradients():
    class Checkpointed(nn.Module):
        saving = True

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                saving = self.saving and self.training
                x = checkpoint(layer, x, use_reentrant=False) if saving else layer(x)
            return x

    torch.manual_seed(0)
    model, batch = Checkpointed(), torch.randn(3, 4)
    prefix, suffix = split(model, "layers.2", batch)
    found = []
    for suffix.root.saving in (True, False):
        suffix.train().zero_grad()
        loss(recycle(prefix, suffix, batch, seed=3)).backward()
        found.append({name: gradient.clone() for name, gradient in gradients(suffix).items()})
    assert found[0].keys() == found[1].keys() == dict(suffix.named_parameters()).keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=0)
