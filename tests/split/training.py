"""Steps of training, of a suffix and of the full model with a frozen prefix."""

import copy
from contextlib import nullcontext

import pytest
import torch
from zoo.proof import assert_same, call, gradients, loss

from pipeline.split.tree import as_call, map_tensors

EXACT = 1e-6
SEED = 5


only = lambda *names: pytest.mark.parametrize("shared", names, indirect=True, scope="module")  # noqa: E731


def full_model(net, model=None, from_cut=nullcontext):
    """The full model with a frozen prefix: before the cut in eval mode, from it on in train mode and `from_cut`."""
    full = copy.deepcopy(model or net.model)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name not in net.prefix.weights())
    entered = []

    def begin(*_):
        full.eval()

    def enter(*_):
        full.train()
        entered.append(from_cut())
        entered[-1].__enter__()

    def end(*_):
        entered.pop().__exit__(None, None, None)

    full.register_forward_pre_hook(begin)
    full.get_submodule(net.prefix.cut.path).register_forward_pre_hook(enter)
    full.register_forward_hook(end)
    return full


def cast(batch, dtype):
    return map_tensors(lambda _, item: item.to(dtype) if item.is_floating_point() else item, batch)


def run(suffix, state, batch):
    args, kwargs = as_call(batch)
    return suffix(state, *args, **kwargs)


def encode(prefix, batch):
    args, kwargs = as_call(batch)
    return prefix(*args, **kwargs)


def learn(module, forward):
    """Forward and backward with a fixed seed; return the outputs, gradients and buffers that it leads to."""
    module.zero_grad()
    torch.manual_seed(SEED)
    output = forward()
    loss(output).backward()
    return {"output": output, "gradients": gradients(module)}


def prove_step(net, full, suffix, bound=EXACT, size=3, batch=None, state=None):
    batch = net.batch(size) if batch is None else batch
    state = encode(net.prefix, net.batch(size)) if state is None else state
    expected = learn(full, lambda: call(full, batch))
    found = learn(suffix, lambda: run(suffix, state, net.batch(size)))
    assert expected["gradients"].keys() == found["gradients"].keys() == dict(suffix.named_parameters()).keys()
    for what, values in expected.items():
        assert_same(what, values, found[what], bound)
    trained = suffix.state_dict()
    assert_same("buffers", {name: full.state_dict()[name] for name in trained}, trained, bound)
