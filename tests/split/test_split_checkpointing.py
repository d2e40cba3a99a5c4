"""Gradient checkpointing and compilation work on a suffix, and give what the full model with a frozen prefix gives."""

import copy
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from training import encode, full_model, learn, only, prove_step, run
from zoo.proof import assert_same, loss, recycle

from pipeline.errors import SplitError
from pipeline.split import split

pytestmark = pytest.mark.slow


@contextmanager
def calls_counted(module):
    """Count the calls of the last module within `module` that has weights of its own."""
    leaf = [item for item in module.modules() if item._parameters][-1]
    counts = [0]
    handle = leaf.register_forward_pre_hook(lambda *_: counts.append(counts.pop() + 1))
    yield counts
    handle.remove()


class Checkpointed(nn.Module):
    """Recomputes its layers in regions of `region` layers."""

    def __init__(self, region=1, reentrant=False):
        super().__init__()
        self.region, self.reentrant = region, reentrant
        self.position = nn.Parameter(torch.ones(4))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        x = x + self.position
        for start in range(0, 4, self.region):
            layers = self.layers[start : start + self.region]
            x = checkpoint(nn.Sequential(*layers), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
class TestGradientCheckpointing:
    @only("bert", "gpt2", "vit")
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_of_transformers(self, net, reentrant, when):
        settings = {"use_reentrant": reentrant}
        if when == "before":
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
            model = copy.deepcopy(net.model)
            model.gradient_checkpointing_enable(settings)
            suffix = split(model, net.at, net.batch(2))[1].train()
        else:
            suffix = net.suffix
            suffix.root.gradient_checkpointing_enable(settings)
        state = encode(net.prefix, net.batch(3))
        state = {name: item.requires_grad_(reentrant) for name, item in state.items()}
        with calls_counted(suffix.root.get_submodule(net.prefix.cut.path)) as calls:
            prove_step(net, full_model(net), suffix, state=state)
        assert calls == [2]

    @only("bert")
    def test_torch_tells_where_a_reentrant_one_stops_all_gradients(self, net):
        net.suffix.root.gradient_checkpointing_enable({"use_reentrant": True})
        state = encode(net.prefix, net.batch(3))
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            run(net.suffix, state, net.batch(3))

    @only("tinynet")
    def test_of_timm(self, net):
        full = full_model(net)
        full.set_grad_checkpointing()
        net.suffix.root.set_grad_checkpointing()
        with calls_counted(net.suffix.root.get_submodule(net.prefix.cut.path)) as calls:
            prove_step(net, full, net.suffix)
        assert calls == [2]

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize(("region", "at"), [(1, "layers.2"), (2, "layers.2")])
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
    def test_of_regions_after_the_cut(self, region, at, reentrant):
        torch.manual_seed(0)
        model, batch = Checkpointed(region, reentrant), torch.randn(3, 4)
        prefix, suffix = split(model, at, batch)
        suffix.train()
        state = {name: item.requires_grad_(reentrant) for name, item in prefix(batch).items()}
        net = SimpleNamespace(model=model, prefix=prefix, batch=lambda _: batch)
        model.reentrant = False
        with calls_counted(suffix.root.layers[3]) as calls:
            prove_step(net, full_model(net), suffix, state=state)
        assert calls == [2]

    @pytest.mark.parametrize(("region", "at"), [(2, "layers.3"), (1, "layers.0"), (4, "layers.1")])
    def test_of_a_region_that_holds_the_cut_is_refused(self, region, at):
        prefix, suffix = split(Checkpointed(region), at, torch.randn(3, 4))
        batch = torch.randn(3, 4)
        with pytest.raises(SplitError, match=f"recomputes a region that holds the cut {at}"):
            loss(recycle(prefix, suffix.train(), batch)).backward()


class TestCompile:
    @pytest.mark.parametrize(
        ("shared", "kind"),
        [("bert", "eager"), ("resnet", "aot_eager"), ("skip", "aot_eager")],
        indirect=["shared"],
        scope="module",
    )
    def test_one_graph_takes_batches_of_any_size(self, net, kind):
        """At first one for the size met, then one for all; what a compiler makes of it is not looked at here."""
        torch._dynamo.reset()
        counters.clear()
        backend = CompileCounterWithBackend(kind)
        compiled = torch.compile(net.suffix, backend=backend)
        plain = copy.deepcopy(net.suffix)
        for size in (3, 4, 3):
            state = encode(net.prefix, net.batch(size))
            expected = learn(plain, lambda state=state, size=size: run(plain, state, net.batch(size)))
            found = learn(net.suffix, lambda state=state, size=size: run(compiled, state, net.batch(size)))
            for what, values in expected.items():
                assert_same(what, values, found[what], 1e-5)
        assert not counters["graph_break"]
        assert backend.frame_count == 2
