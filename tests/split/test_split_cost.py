"""A suffix holds no weight of its prefix, repeats none of its operations, and leaves the layers after the cut alone."""

import gc
import types

import pytest
import torch
from nets import NETS, halves
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo.proof import call, recycle

from pipeline.split.phantom import Phantom
from pipeline.split.tree import arguments, tensors

SMALL = 1024  # bytes of all stand-ins together


@pytest.fixture(scope="module", params=NETS)
def net(request):
    """The halves of a network, used once."""
    net = halves(request.param)
    loss = sum(item.float().square().mean() for item in tensors(recycle(net.prefix, net.suffix, net.batch(3))).values())
    assert loss.isfinite()
    return net


def stored_bytes(items):
    """Memory of the tensors, shared memory counted once."""
    storages = [item.untyped_storage() for item in items]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def reachable_tensors(start):
    """All tensors that `start` keeps in memory, through whatever objects."""
    seen, pending, found = {}, [start], []
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            found.append(item)
        if isinstance(item, types.FunctionType):
            pending += [item.__closure__, item.__defaults__, item.__dict__]  # not its module's globals
        else:
            pending += gc.get_referents(item)
    return [item for item in found if not item.is_meta]


def test_holds_no_weight_of_the_prefix(net):
    kept = net.suffix.frozen.kept.values()
    needed = stored_bytes([*net.suffix.parameters(), *net.suffix.buffers(), *kept])
    weights = dict(net.model.named_parameters())
    assert stored_bytes(weights[name] for name in net.prefix.weights() if name in weights) > 4 * SMALL
    held = reachable_tensors(net.suffix)
    assert not any(isinstance(item, Phantom) for item in held)
    assert needed <= stored_bytes(held) <= needed + SMALL


def test_the_search_for_tensors_finds_what_is_hidden(net):
    hidden = torch.ones(SMALL)
    holder = types.SimpleNamespace(suffix=net.suffix, forward=lambda: hidden)
    assert any(item is hidden for item in reachable_tensors(holder))


def test_runs_no_operation_of_the_prefix(net):
    batch, suffix = net.batch(3), net.suffix.eval()

    def flops(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = run()
        return counter.get_total_flops(), result

    full, _ = flops(lambda: call(net.model.eval(), batch))
    before, _ = flops(lambda: recycle(net.prefix, lambda state, *args, **inputs: state, batch))
    both, _ = flops(lambda: recycle(net.prefix, suffix, batch))
    assert 0 < before < full
    assert both == full


def test_leaves_no_hook_and_no_wrapper_behind_the_cut(net):
    root, met, after = net.suffix.root, [], set()
    for name, module in root.named_modules():
        theirs = net.model.get_submodule(name)
        assert type(module) is type(theirs)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert len(getattr(module, hooks)) == len(getattr(theirs, hooks))

    cut = root.get_submodule(net.prefix.cut.path)
    cut.register_forward_pre_hook(lambda *_: after.add(cut))

    def follow(module, args, kwargs, output):
        if after:
            after.add(module)
            met.extend(arguments((*args, output), kwargs).values())

    for module in root.modules():
        module.register_forward_hook(follow, with_kwargs=True)
    recycle(net.prefix, net.suffix, net.batch(3))
    assert len(after) > 1
    assert {type(item) for item in met} <= {torch.Tensor, nn.Parameter}
    assert {module for module in after if "forward" in vars(module)} == {cut}
