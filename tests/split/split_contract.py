"""What every split promises, as tests that each model's subclass inherits."""

import copy

import pytest
import torch

from pipeline.split import merge
from pipeline.split.layout import difference
from pipeline.split.tree import as_call, tensors

EXACT = 1e-6
GRADIENT = 1e-5
SEED = 11


def call(model, example):
    args, kwargs = as_call(example)
    return model(*args, **kwargs)


def recycle(prefix, suffix, example, seed=None):
    """Run both halves; the seed is set between them, as the suffix's randomness is all there is."""
    args, kwargs = as_call(example)
    state = prefix(*args, **kwargs)
    if seed is not None:
        torch.manual_seed(seed)
    return suffix(state, *args, **kwargs)


def loss(output):
    return sum(tensor.float().square().mean() for tensor in tensors(output).values() if tensor.requires_grad)


def gradients(module):
    return {name: item.grad for name, item in module.named_parameters() if item.grad is not None}


def reference(model, prefix, training):
    """The full model with a frozen prefix in eval mode: flags are the model's own from the cut on."""
    full = copy.deepcopy(model).train(training)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name not in prefix.weights())
    flags = [(module, module.training) for module in full.modules()]
    calls = iter(range(100))

    def enter(*_):
        if next(calls) == prefix.cut.call:
            for module, flag in flags:
                module.training = flag

    full.eval()
    full.get_submodule(prefix.cut.path).register_forward_pre_hook(enter)
    return full


def assert_same(expected, found, bound):
    expected, found = tensors(expected), tensors(found)
    assert expected.keys() == found.keys()
    assert {name: difference(item, found[name]) for name, item in expected.items()} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=bound
    )


class SplitContract:
    """Subclasses give a `model` and an `example` of two sizes; every one of the `cuts` must then be exact."""

    cuts = (0, 0.25, 0.5, 0.75, 1)
    slow_cuts = ()  # where phantoms must serve, because a recycled output is written to in place

    def model(self):
        raise NotImplementedError

    def example(self, size):
        raise NotImplementedError

    @pytest.mark.parametrize("size", [2, 3])
    def test_output_is_the_full_model_s(self, case, size):
        case.model.eval()
        case.suffix.eval()
        example = self.example(size)
        with torch.no_grad():
            expected, found = call(case.model, example), recycle(case.prefix, case.suffix, example)
        assert type(found) is type(expected)
        assert_same(expected, found, EXACT)

    @pytest.mark.parametrize("training", [False, True])
    def test_gradients_and_running_statistics_are_the_full_model_s(self, case, training):
        full = reference(case.model, case.prefix, training)
        suffix = copy.deepcopy(case.suffix).train(training)
        torch.manual_seed(SEED)
        loss(call(full, case.example)).backward()
        loss(recycle(case.prefix, suffix, case.example, SEED)).backward()
        assert_same(gradients(full), gradients(suffix), GRADIENT)
        buffers = dict(full.named_buffers())
        trained = {name: item for name, item in suffix.state_dict().items() if name in buffers}
        assert_same({name: buffers[name] for name in trained}, trained, EXACT)

    def test_the_fast_path_does_what_the_phantoms_do(self, case):
        assert (case.suffix.fast is None) == (case.at in self.slow_cuts)
        args, kwargs = as_call(self.example(3))
        state = case.prefix(*args, **kwargs)
        suffix = case.suffix.eval()
        with torch.no_grad():
            assert_same(suffix.replay(suffix.values(state), args, kwargs), suffix(state, *args, **kwargs), EXACT)

    def test_state_has_the_batch_axis_first_and_fits_the_spec(self, case):
        args, kwargs = as_call(self.example(3))
        state = case.prefix(*args, **kwargs)
        assert state.keys() == case.prefix.spec.keys() == case.suffix.spec.keys()
        for name, tensor in state.items():
            assert tensor.shape == (3, *case.prefix.spec[name].shape)
            assert tensor.dtype == case.prefix.spec[name].dtype

    def test_only_what_trains_has_a_name(self, case):
        names = {name for name, _ in case.suffix.named_parameters()}
        assert names <= {name for name, _ in case.model.named_parameters()}
        assert names.isdisjoint(case.prefix.weights())
        assert case.suffix.state_dict().keys() <= case.model.state_dict().keys()
        assert case.suffix.state_dict().keys().isdisjoint(case.prefix.weights())

    def test_trained_suffix_merges_into_the_full_model(self, case):
        suffix = copy.deepcopy(case.suffix).train()
        optimizer = torch.optim.SGD(suffix.parameters(), lr=1e-3)
        loss(recycle(case.prefix, suffix, case.example, SEED)).backward()
        torch.nn.utils.clip_grad_norm_(suffix.parameters(), 1.0)
        optimizer.step()
        reloaded = copy.deepcopy(case.suffix)
        reloaded.load_state_dict(suffix.state_dict())
        merged = merge(copy.deepcopy(case.model), reloaded).eval()
        with torch.no_grad():
            found = recycle(case.prefix, suffix.eval(), case.example)
            assert_same(call(merged, case.example), found, EXACT)
            assert_same(recycle(case.prefix, reloaded.eval(), case.example), found, EXACT)
