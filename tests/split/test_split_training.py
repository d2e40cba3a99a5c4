"""What is done to modules in training works on a suffix, and gives what the full model with a frozen prefix gives."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from nets import halves
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import EXACT, SEED, cast, encode, full_model, learn, only, prove_step, run
from zoo.proof import assert_same, call, gradients, loss

from pipeline.errors import SplitError
from pipeline.split import merge, split
from pipeline.split.tree import map_tensors, tensors

pytestmark = pytest.mark.slow


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

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator here")
    def test_accelerator(self, net):
        device = torch.accelerator.current_accelerator()
        full, batch = full_model(net).to(device), map_tensors(lambda _, item: item.to(device), net.batch(3))
        net.suffix.to(device)
        expected = learn(full.eval(), lambda: call(full, batch))
        state = map_tensors(lambda _, item: item.to(device), encode(net.prefix, net.batch(3)))
        found = learn(net.suffix, lambda: run(net.suffix, state, batch))
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
