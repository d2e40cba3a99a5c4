"""Batches that pass the blocks of a network together, whose weights are in place in their block only."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from pipeline.errors import InputRefusedError, SplitError
from pipeline.models.weights import convert
from pipeline.split import Capture, Placement, divide, run_together, split
from pipeline.split.turns import current, take_turns

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Net(nn.Module):
    """Six blocks, the last of which reads what the first returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:-1]:
            x = block(x)
        return self.head(self.blocks[-1](x + first))


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(2 + i, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, float("inf")])
def test_states_are_those_of_batches_alone(dtype: torch.dtype | None, memory: float) -> None:
    whole, divided = Net(), Net()
    if dtype is not None:
        convert(whole, dtype)
    divide(divided, {"x": batches()[0]}, Placement(CPU, dtype))
    example = batches()[0].to(dtype or torch.float32)
    prefixes = [[split(net, at, example, share=True)[0] for at in (0.5, 1.0)] for net in (whole, divided)]
    inputs = [batch.to(example.dtype) for batch in batches()]
    found = run_together(divided, [partial(Capture(prefixes[1]), x=batch) for batch in inputs], memory)
    for batch, states in zip(inputs, found, strict=True):
        expected = Capture(prefixes[0])(x=batch)
        assert [list(state) for state in states] == [list(state) for state in expected]
        assert all(torch.equal(a[name], b[name]) for a, b in zip(states, expected, strict=True) for name in a)
    for ours, theirs in zip(*prefixes, strict=True):
        weights = theirs.weights()
        assert list(weights) == list(ours.weights())
        assert all(torch.equal(item, weights[name]) for name, item in ours.weights().items())


def test_weights_to_convert_are_there_in_their_block_only() -> None:
    net, seen = Net(), list[list[int]]()
    divide(net, {"x": batches()[0]}, Placement(CPU, torch.bfloat16))

    def there(*_: Any) -> None:
        seen.append([i for i, block in enumerate(net.blocks) if not block.first.weight.isnan().any()])

    for block in net.blocks:
        block.second.register_forward_hook(there)
    run_together(net, [partial(net, batch.bfloat16()) for batch in batches()])
    assert seen == [[i] for i in range(6) for _ in range(3)]
    assert all(item.isnan().all() for item in net.blocks.parameters())


def test_a_weight_read_outside_of_its_block_is_refused() -> None:
    class Peeking(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.blocks[3].first.weight.sum())

    with pytest.raises(SplitError, match=r"'blocks\.3\.first\.weight' is read outside of its block"):
        divide(Peeking(), {"x": batches()[0]}, Placement(CPU, torch.bfloat16))
    divide(Peeking(), {"x": batches()[0]}, Placement(CPU))


def test_an_error_ends_all_calls() -> None:
    net = Net()
    divide(net, {"x": batches()[0]}, Placement(CPU))
    prefix, _ = split(net, 0.5, batches()[0])
    wrong = [partial(prefix, batch) for batch in (*batches(), torch.ones(2, 5))]
    with pytest.raises(InputRefusedError, match="cannot be multiplied"):
        run_together(net, wrong)
    assert len(run_together(net, wrong[:-1])) == 3


def test_calls_pass_each_place_together_in_groups_that_fit() -> None:
    order: list[tuple[int, str]] = []

    def call(number: int) -> int:
        for place in "abc":
            turn = current()
            assert turn is not None
            turn.wait(place, 10)
            order.append((number, place))
        return number

    calls: list[Callable[[], int]] = [partial(call, number) for number in range(5)]
    assert take_turns(calls, lambda size: size <= 30) == [0, 1, 2, 3, 4]
    assert order == [(n, place) for group in ((0, 1, 2), (3, 4)) for place in "abc" for n in group]


MEMORY = """
from pipeline.memory import keep_freed_memory
keep_freed_memory()
from pathlib import Path
from pipeline.project import Project
from pipeline.workflows.encode import encode_project

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

from pipeline.split.sections import Sections
most, enter = [], Sections.enter
Sections.enter = lambda self, *rest: (enter(self, *rest), most.append(anonymous()))[0]
import pipeline.project.model, pipeline.models.hf
before = anonymous()
assert encode_project(Project.load(Path("params.yaml")))
print("MB", max(most) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_memory_is_less_than_the_weights(tmp_path: Path, dtype: str) -> None:
    """24 blocks of 12.6 MB in float32, 302 MB in all."""
    import transformers  # noqa: PLC0415  (slow to import)

    tiny.write_text_network(tmp_path / "net")
    (tmp_path / "net/model.safetensors").unlink()
    config = transformers.LlamaConfig(
        vocab_size=len(tiny.TOKENS),
        hidden_size=512,
        intermediate_size=1400,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "net", max_shard_size="40MB")
    (tmp_path / "texts.csv").write_text(
        "text,label\n" + "".join(f"{'one ' * (i % 5 + 1)},{i % 2}\n" for i in range(24))
    )
    tiny.write_params(
        tmp_path,
        data={"source": "text", "path": "texts.csv", "text": "text", "label": "label"},
        model={"backbone": "hf:net", "dtype": dtype},
        preprocess={"kind": "text", "image_size": None},
        encode={"cuts": [0.9], "placement": "stream"},
    )
    process = tiny.python(tmp_path, "-c", MEMORY)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert float(said.rsplit("MB", 1)[1]) < 100, said
