"""What is done to modules in training works on a suffix, and gives what the full model with a frozen prefix gives."""

import copy
import io
import pickle
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from nets import NETS, halves
from torch import distributed, multiprocessing, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from zoo.proof import assert_same, call, gradients, loss, recycle

from pipeline.errors import SplitError
from pipeline.split import merge, split
from pipeline.split.tree import as_call, map_tensors, tensors

pytestmark = pytest.mark.slow

EXACT = 1e-6
SEED = 5


@pytest.fixture(scope="module", params=NETS)
def shared(request):
    return halves(request.param)


@pytest.fixture
def net(shared):
    """A model with its halves; the suffix is a copy of its own for each test, in train mode."""
    return SimpleNamespace(**{**vars(shared), "suffix": copy.deepcopy(shared.suffix).train()})


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


class TestDtypeAndDevice:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_a_suffix_moves_to_another_dtype(self, net, dtype):
        """A model that was moved before its split is the reference; the inputs may stay as they were."""
        model = copy.deepcopy(net.model).to(dtype)
        batch = cast(net.batch(3), dtype)
        prefix, moved = split(model, net.at, cast(net.batch(2), dtype))
        state = encode(prefix, batch)
        prove_step(net, full_model(net, model), net.suffix.to(dtype), batch=batch, state=state)
        expected = learn(moved.train(), lambda: run(moved, state, batch))
        found = learn(net.suffix, lambda: run(net.suffix, state, net.batch(3)))
        assert_same("gradients", expected["gradients"], found["gradients"], 0.0)

    def test_autocast(self, net):
        """States are made without it, as when they come from a store."""
        bfloat16 = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        state, full = encode(net.prefix, net.batch(3)), full_model(net, from_cut=bfloat16)
        expected = learn(full, lambda: call(full, net.batch(3)))
        found = learn(net.suffix, bfloat16()(lambda: run(net.suffix, state, net.batch(3))))
        for what, values in expected.items():
            assert_same(what, values, found[what], EXACT)

    @only("bert")
    def test_the_dtype_of_autocast_is_part_of_the_signature(self, net):
        state = encode(net.prefix, net.batch(3))
        found = []
        for dtypes in ([torch.bfloat16, torch.float16], [torch.float16]):
            suffix = copy.deepcopy(net.suffix).eval()
            for dtype in dtypes:
                with torch.autocast("cpu", dtype), torch.no_grad():
                    output = run(suffix, state, net.batch(3))
            found.append(output)
        assert_same("outputs", *found, 0.0)

    def test_training_after_prediction_in_inference_mode(self, net):
        state = encode(net.prefix, net.batch(3))
        with torch.inference_mode():
            found = run(net.suffix.eval(), {name: item.clone() for name, item in state.items()}, net.batch(3))
            assert_same("outputs", call(net.model, net.batch(3)), found, EXACT)
        prove_step(net, full_model(net), net.suffix.train())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
    def test_cuda(self, net):
        full, batch = full_model(net).cuda(), map_tensors(lambda _, item: item.cuda(), net.batch(3))
        net.suffix.cuda()
        expected = learn(full.eval(), lambda: call(full, batch))
        found = learn(net.suffix, lambda: run(net.suffix, encode(net.prefix, net.batch(3)), batch))
        assert expected["gradients"].keys() == found["gradients"].keys()


def test_gradients_accumulate(net):
    """Each of two losses with a backward pass of its own, and two that share one."""
    full = full_model(net)
    for module, forward in (
        (full, lambda size: call(full, net.batch(size))),
        (net.suffix, lambda size: run(net.suffix, encode(net.prefix, net.batch(size)), net.batch(size))),
    ):
        torch.manual_seed(SEED)
        for sizes in ([3], [2], [4, 2]):
            sum(loss(forward(size)) for size in sizes).backward()
        assert gradients(module).keys() == dict(net.suffix.named_parameters()).keys()
    assert_same("gradients", gradients(full), gradients(net.suffix), EXACT)
    trained = net.suffix.state_dict()
    assert_same("buffers", {name: full.state_dict()[name] for name in trained}, trained, EXACT)


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


PARALLEL = ("bert", "resnet", "skip")


def train_on_half(rank, folder):
    """One of two processes: a backward pass on every second sample."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in PARALLEL:
        net = halves(name)
        batch = map_tensors(lambda _, item: item[rank::2], net.batch(4))
        parallel = DistributedDataParallel(net.suffix)
        loss(run(parallel, encode(net.prefix, batch), batch)).backward()
        torch.save(gradients(net.suffix), f"{folder}/{name}{rank}")
    distributed.destroy_process_group()


def test_two_processes_on_half_a_batch_each_find_the_gradients_of_the_whole(tmp_path):
    multiprocessing.spawn(train_on_half, (str(tmp_path),), nprocs=2)
    for name in PARALLEL:
        net = halves(name)
        loss(call(net.model, net.batch(4))).backward()
        expected = {key: item for key, item in gradients(net.model).items() if key not in net.prefix.weights()}
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}")
            assert found.keys() == expected.keys()
            scale = max(item.abs().max() for item in expected.values())
            assert max((found[key] - item).abs().max() / scale for key, item in expected.items()) < 1e-6


def test_data_parallel_is_refused(net):
    with pytest.raises(SplitError, match="DistributedDataParallel"):
        net.suffix._replicate_for_data_parallel()


@only("bert", "resnet")
def test_accelerate_goes_on_from_a_saved_state(net, tmp_path):
    def start():
        suffix = copy.deepcopy(net.suffix)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(suffix, torch.optim.AdamW(suffix.parameters(), lr=1e-2))

    def train(accelerator, suffix, optimizer, sizes):
        for size in sizes:
            optimizer.zero_grad()
            accelerator.backward(loss(run(suffix, encode(net.prefix, net.batch(size)), net.batch(size))))
            optimizer.step()
        return suffix.state_dict()

    whole = start()
    torch.manual_seed(SEED)
    train(*whole, (2, 3))
    whole[0].save_state(str(tmp_path))
    expected = train(*whole, (4, 2))
    resumed = start()
    torch.manual_seed(SEED + 1)
    resumed[0].load_state(str(tmp_path))
    assert_same("weights", expected, train(*resumed, (4, 2)), 0.0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda suffix: pickle.loads(pickle.dumps(suffix))])
def test_a_copy_runs_on_its_own_modules(net, duplicate):
    state, batch = encode(net.prefix, net.batch(3)), net.batch(3)
    with torch.no_grad():
        expected = run(net.suffix.eval(), state, batch)
        twin = duplicate(net.suffix)
        for parameter in net.suffix.parameters():
            parameter.fill_(float("nan"))
        assert_same("outputs of the copy", expected, run(twin, state, batch), 0.0)
        assert all(tensor.isnan().all() for tensor in tensors(run(net.suffix, state, batch)).values())
    twin.train()
    prove_step(net, full_model(net), twin)


def test_a_moving_average_of_weights(net):
    average = AveragedModel(net.suffix, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    average.update_parameters(net.suffix)
    before = {name: item.detach().clone() for name, item in net.suffix.named_parameters()}
    with torch.no_grad():
        for parameter in net.suffix.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    average.update_parameters(net.suffix)
    now, weights = net.suffix.state_dict(), average.module.state_dict()
    weights = {name: weights[name] for name in before}
    assert_same("weights", {name: (item + now[name]) / 2 for name, item in before.items()}, weights, EXACT)
    with torch.no_grad():
        expected = call(merge(copy.deepcopy(net.model), average.module).eval(), net.batch(3))
        found = run(average.eval(), encode(net.prefix, net.batch(3)), net.batch(3))
    assert_same("outputs", expected, found, EXACT)


def test_weights_are_saved_and_loaded_without_pickle(net):
    with torch.no_grad():
        for parameter in net.suffix.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    file = io.BytesIO()
    torch.save(net.suffix.state_dict(), file)
    file.seek(0)
    fresh = split(net.model, net.at, net.batch(2))[1]
    assert not fresh.load_state_dict(torch.load(file, weights_only=True)).missing_keys
    state = encode(net.prefix, net.batch(3))
    with torch.no_grad():
        assert_same("outputs", run(net.suffix.eval(), state, net.batch(3)), run(fresh.eval(), state, net.batch(3)), 0.0)
