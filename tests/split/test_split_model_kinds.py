"""Models that are wrapped, compiled, exported or without values are split exactly, or refused with a remedy."""

import tempfile
import threading

import pytest
import torch
import torchvision.models as tv
from split_contract import recycle
from torch import distributed, nn

from pipeline.errors import InputRefusedError, SplitError
from pipeline.split import candidates, merge, split

pytestmark = pytest.mark.slow


def net():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(6, 2)).eval()


def batch(size=3):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(size))


@pytest.fixture(scope="module")
def one_process():
    """A group of this process alone, as distributed wrappers need it."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


def refused(model, reason):
    """Nothing takes the model: neither `split` at any cut, nor `candidates`, nor `merge`."""
    _, suffix = split(net(), 0.5, batch())
    for attempt in (
        lambda: split(model, 0, batch()),
        lambda: split(model, 0.5, batch()),
        lambda: candidates(model, batch()),
        lambda: merge(model, suffix),
    ):
        with pytest.raises(SplitError, match=reason):
            attempt()


def with_block(change):
    """The network with its second block changed."""
    model = net()
    model[1] = change(model[1])
    return model


@pytest.mark.parametrize("compiled", [torch.compile, lambda module: torch.compile(module, backend="eager")])
def test_a_compiled_model_names_what_to_give_instead(compiled):
    refused(compiled(net()), r"^the model is wrapped by torch.compile; give model._orig_mod, and compile the suffix")
    refused(with_block(compiled), r"^module '1' of the model is wrapped .* put model.get_submodule\('1'\)._orig_mod in")


def test_what_a_compiled_model_s_remedy_names_can_be_split():
    model = torch.compile(net())
    prefix, suffix = split(model._orig_mod, 0.5, batch())
    torch.testing.assert_close(recycle(prefix, suffix, batch()), net()(batch()), rtol=0, atol=0)


def a_block_compiled_in_place(model):
    model[1].compile()


def the_whole_compiled_in_place(model):
    model.compile()


@pytest.mark.parametrize("change", [a_block_compiled_in_place, the_whole_compiled_in_place])
def test_a_model_compiled_in_place_is_split_exactly_and_stays_compiled(change):
    model = net()
    change(model)
    compiled = [module._compiled_call_impl for module in model.modules()]
    prefix, suffix = split(model, 0.5, batch())
    torch.testing.assert_close(recycle(prefix, suffix, batch()), net()(batch()), rtol=0, atol=0)
    assert [module._compiled_call_impl for module in model.modules()] == compiled
    assert [one.refused for one in candidates(model, batch())] == [None] * 5


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda module: torch.jit.trace(module, batch())])
def test_script_modules(script):
    refused(script(net()), "^the model is a ScriptModule.*give the nn.Module that was scripted or traced")
    refused(with_block(script), "^module '1' of the model is a ScriptModule")


def test_data_parallel():
    refused(nn.DataParallel(net()), "^the model is wrapped by nn.DataParallel; give model.module, and wrap the suffix")
    refused(with_block(nn.DataParallel), r"^module '1' .* put model.get_submodule\('1'\).module in its place")


@pytest.mark.filterwarnings("ignore")  # of torch.distributed, about a group of one on the CPU
def test_distributed_wrappers(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: PLC0415

    parallel = nn.parallel.DistributedDataParallel(net())
    refused(parallel, "^the model is wrapped by DistributedDataParallel; give model.module, and wrap the suffix")
    sharded = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    refused(sharded, "^the model is wrapped by FullyShardedDataParallel; split the model before")
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    refused(fully_shard(net(), mesh=mesh), "^the model is wrapped by fully_shard; split the model before")
    distributed_weights = net()
    for name, weight in list(distributed_weights[1][0].named_parameters()):
        value = distributed.tensor.distribute_tensor(weight.detach(), mesh)
        setattr(distributed_weights[1][0], name, nn.Parameter(value))
    refused(
        distributed_weights, r"^the model's tensor '1.0.weight' is a DTensor, which holds its values in its own way"
    )


@pytest.mark.parametrize(("number", "name"), [(0, "0.0.weight"), (3, "3.0.weight")])
def test_a_part_on_the_meta_device(number, name):
    model = net()
    model[number].to("meta")
    refused(model, rf"^the model's tensor '{name}' is on the meta device, without values; load the weights first")


def test_a_whole_network_on_the_meta_device():
    model = tv.resnet18(num_classes=3).to("meta")
    with pytest.raises(SplitError, match=r"tensor 'conv1.weight' is on the meta device"):
        split(model, 0.5, {"x": torch.zeros(4, 3, 32, 32)})


def test_a_buffer_on_the_meta_device():
    model = net()
    model[1].register_buffer("scale", torch.ones(6, device="meta"))
    refused(model, "^the model's tensor '1.scale' is on the meta device")


def test_a_lazy_module_until_it_is_initialised():
    model = net()
    model[4] = nn.LazyLinear(2)
    refused(model, "^the model's tensor '4.weight' has no shape yet.*run the model on a batch before")
    model(batch())
    prefix, suffix = split(model, 0.5, batch())
    torch.testing.assert_close(recycle(prefix, suffix, batch()), model(batch()), rtol=0, atol=0)


def test_a_sparse_weight():
    model = net()
    model[1][0].weight = nn.Parameter(model[1][0].weight.detach().to_sparse())
    refused(model, r"^the model's tensor '1.0.weight' has the layout torch.sparse_coo; convert it by to_dense\(\)")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Identity(), r"the model \(Identity\) has no parameters"),
        (nn.Sequential(), r"the model \(Sequential\) has no parameters"),
        (lambda x: x, "the model is of type function, no nn.Module"),
        (nn.Linear, "the model is the class Linear, no nn.Module; give an instance"),
        (None, "the model is of type NoneType, no nn.Module"),
    ],
)
def test_no_module_with_parameters(model, reason):
    refused(model, reason)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_model_keeps_its_weights_out_of_sight():
    quantized = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    refused(quantized, "has no parameters.* of a quantized model the one in floating point")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("at", [0, "2", "4"])
def test_a_quantized_layer_before_or_after_the_cut(at):
    model = with_block(
        lambda block: torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, dtype=torch.qint8),
    )
    prefix, suffix = split(model, at, batch())
    torch.testing.assert_close(recycle(prefix, suffix, batch()), model(batch()), rtol=0, atol=0)


def test_an_exported_program_has_no_eval_mode():
    refused(torch.export.export(net(), (batch(),)).module(), "has no eval mode .* give the module that it was exported")


def test_a_graph_module_is_split_like_the_module_it_was_traced_from():
    model = torch.fx.symbolic_trace(net())
    prefix, suffix = split(model, 0.5, batch())
    assert prefix.cut.path == "2.0"
    assert [one.cut.name for one in candidates(model, batch())] == ["", "1.0", "2.0", "3.0", "4"]
    torch.testing.assert_close(recycle(prefix, suffix, batch()), net()(batch()), rtol=0, atol=0)
    assert "4.weight" in suffix.state_dict()


def test_a_module_that_cannot_be_copied_is_named():
    model = net()
    model[1].lock = threading.Lock()
    with pytest.raises(SplitError, match=r"^module '1' of the model cannot be copied \(TypeError: .*lock.*no locks"):
        split(model, 0.5, batch())


class Takes(nn.Module):
    """A network that fails where its own check says so."""

    def __init__(self, mode=None):
        super().__init__()
        self.first, self.second, self.mode = nn.Linear(6, 6), nn.Linear(6, 2), mode

    def forward(self, pixels, *, ids=None):
        if self.mode == ("train" if self.training else "eval"):
            raise ValueError(f"no {self.mode} with me")
        return self.second(self.first(pixels))


@pytest.mark.parametrize("ask", [lambda *given: split(given[0], "second", given[1]), candidates])
def test_an_example_that_the_model_s_code_fails_on(ask):
    example = {"pixels": torch.zeros(4, 5), "ids": torch.zeros(4, 7, dtype=torch.long)}
    with pytest.raises(InputRefusedError) as told:
        ask(Takes(), example)
    assert str(told.value) == (
        "the model's forward fails in eval mode with RuntimeError: mat1 and mat2 shapes cannot be multiplied "
        "(2x5 and 6x6); its inputs are pixels (2, 5) float32, ids (2, 7) int64; give inputs of the sizes, dtypes and "
        "values that the model takes"
    )
    assert isinstance(told.value.__cause__, RuntimeError)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_error_of_the_model_s_own(mode):
    with pytest.raises(InputRefusedError, match=rf"fails in {mode} mode with ValueError: no {mode} with me; .*pixels"):
        split(Takes(mode), 0, batch())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_batch_norm_that_has_one_value_to_train_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.BatchNorm1d(8))
    with pytest.raises(InputRefusedError, match="train mode with ValueError: Expected more than 1 value per channel"):
        split(model, 0, torch.zeros(2, 3, 4, 4))


def test_inputs_that_a_prefix_s_model_fails_on():
    prefix, _ = split(net(), 0.5, batch())
    with pytest.raises(InputRefusedError, match=r"cannot be multiplied \(3x5 and 6x6\); its inputs are input \(3, 5\)"):
        prefix(torch.zeros(3, 5))


def test_a_lack_of_memory_is_no_fault_of_the_inputs():
    class Large(Takes):
        def forward(self, pixels):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        split(Large(), "second", batch())
