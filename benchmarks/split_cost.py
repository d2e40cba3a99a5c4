"""What a training step costs before and after recycling, and how long the suffix takes to reach the cut.

    python benchmarks/split_cost.py [--threads 1] [--repeats 5] [case ...]

Each row is one run of one process: medians of forward plus backward for the full model, for the model with its prefix
frozen but run each step, for the suffix alone, and for the suffix's layers called by hand; then medians of the time
from the call of the suffix to its cut, for inputs of a new shape and of a known one. First, once: a forward pass of the
full model without gradients, and the split on the same batch. Weights are random: values do not change the times.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision.models as tv
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from pipeline.memory import keep_freed_memory
from pipeline.split import Suffix, split


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the cut to measure.

    Attributes:
        layers: the layers after the cut of a model, called by hand on the state (B, ...) and the batch.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    at: str | float
    layers: Callable[[nn.Module, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def images(size: int, pixels: int = 224, name: str = "x") -> Callable[[], dict[str, torch.Tensor]]:
    """Return a maker of image batches."""
    return lambda: {name: torch.randn(size, 3, pixels, pixels)}


def text(size: int, length: int, ragged: bool) -> Callable[[], dict[str, torch.Tensor]]:
    """Return a maker of batches of token ids, full or padded on the right."""
    lengths = torch.linspace(length / 2 if ragged else length, length, size).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return lambda: {"input_ids": torch.randint(1, 30_000, (size, length)) * mask, "attention_mask": mask}


def bert(first: int) -> Callable[[Any, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]:
    """Return the layers of a BERT classifier from number `first` on."""

    def layers(model: Any, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"][:, None, None, :].bool()
        for layer in model.bert.encoder.layer[first:]:
            hidden = layer(hidden, None if mask.all() else mask)
        return result(model.classifier(model.dropout(model.bert.pooler(hidden))))

    return layers


def resnet(first: int) -> Callable[[Any, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]:
    """Return the stages of a ResNet from number `first` on."""

    def layers(model: Any, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        for stage in [model.layer1, model.layer2, model.layer3, model.layer4][first - 1 :]:
            hidden = stage(hidden)
        return result(model.fc(model.avgpool(hidden).flatten(1)))

    return layers


def efficientnet(model: Any, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the last quarter of EfficientNet-Lite0's sixteen blocks and its head."""
    blocks = [block for stage in model.blocks for block in stage]
    for block in blocks[12:]:
        hidden = block(hidden)
    return result(model.forward_head(model.bn2(model.conv_head(hidden))))


def vit(model: Any, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the upper half of ViT-B's layers and its head."""
    for layer in model.encoder.layers[6:]:
        hidden = layer(hidden)
    return result(model.heads(model.encoder.ln(hidden)[:, 0]))


def bert_base() -> nn.Module:
    """Return BERT-base with a classifier."""
    return BertForSequenceClassification(BertConfig())


CASES = {
    "BERT-base @6, 8x128, full mask": Case(bert_base, text(8, 128, False), 0.5, bert(6)),
    "BERT-base @6, 8x128, ragged": Case(bert_base, text(8, 128, True), 0.5, bert(6)),
    "BERT-base @9, 8x128, ragged": Case(bert_base, text(8, 128, True), 0.75, bert(9)),
    "ResNet-34 @layer3, 4x224px": Case(tv.resnet34, images(4), "layer3", resnet(3)),
    "ResNet-34 @layer4, 4x224px": Case(tv.resnet34, images(4), "layer4", resnet(4)),
    "EfficientNet-Lite0 @0.75, 4x224px": Case(
        lambda: timm.create_model("tf_efficientnet_lite0"), images(4), 0.75, efficientnet
    ),
    "ViT-B/16 @6, 2x224px": Case(tv.vit_b_16, images(2), 0.5, vit),
}


def seconds(step: Callable[[], Any], repeats: int) -> float:
    """Return the median time of `step`, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def step(call: Callable[[], Any], module: nn.Module) -> Callable[[], None]:
    """Return a training step less the optimizer: forward, a stand-in for the loss, backward."""

    def run() -> None:
        module.zero_grad()
        result(call()).square().mean().backward()  # type: ignore[no-untyped-call]

    return run


def result(output: Any) -> torch.Tensor:
    """Return what a model gives, less its wrapping."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return found


def same(found: Any, expected: torch.Tensor) -> None:
    """Raise AssertionError unless the layers called by hand are the suffix's."""
    torch.testing.assert_close(result(found), expected)


class _CutReached(BaseException):
    pass


def microseconds_to_cut(suffix: Suffix, call: Callable[[], Any], steps: int) -> float:
    """Return the median time from the call of the suffix to the entry of its cut module."""
    reached = []

    def stop(*_: Any) -> None:
        reached.append(time.perf_counter())
        raise _CutReached

    call()
    handle = suffix.root.get_submodule(suffix.cut.path).register_forward_pre_hook(stop)
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        try:
            call()
        except _CutReached:
            taken.append(reached[-1] - start)
    handle.remove()
    return 1e6 * statistics.median(taken)


def measure(case: Case, options: argparse.Namespace) -> list[str]:
    """Return the cells of one row."""
    torch.manual_seed(0)
    repeats, batch = options.repeats, case.batch()
    if options.pixels:
        batch = {name: torch.randn(*item.shape[:2], *[options.pixels] * 2) for name, item in batch.items()}
    model = case.model().eval()
    with torch.no_grad():
        forward = seconds(lambda: model(**batch), 1)
    start = time.perf_counter()
    prefix, suffix = split(model, case.at, batch)
    splitting = time.perf_counter() - start
    state = prefix(**batch)
    (hidden,) = (tensor.float() for tensor in state.values())
    same(suffix(state, **batch), case.layers(model, hidden, batch))
    suffix.train()
    full = seconds(step(lambda: model(**batch), model.train()), repeats)
    for name in prefix.weights():
        if name in dict(model.named_parameters()):
            model.get_parameter(name).requires_grad_(False)
    frozen = seconds(step(lambda: model(**batch), model), repeats)
    rest = seconds(step(lambda: suffix(state, **batch), suffix), repeats)
    bare = seconds(step(lambda: case.layers(model, hidden, batch), model.train()), repeats)
    suffix.eval()
    known = microseconds_to_cut(suffix, lambda: suffix(state, **batch), options.steps)

    def new() -> None:
        suffix.replay.forget()
        suffix(state, **batch)

    recorded = microseconds_to_cut(suffix, new, options.steps)
    once = [f"{forward:.2f}", f"{splitting:.2f}"]
    times = [f"{full:.3f}", f"{frozen:.3f}", f"{rest:.3f}", f"{bare:.3f}", f"{frozen / rest:.1f}x"]
    return [*once, *times, f"{recorded:,.0f}", f"{known:,.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="words that a case's name must contain (default: all cases)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of which the time to the cut is the median")
    parser.add_argument("--pixels", type=int, help="size of the images, where a network takes another than its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `recycle` does
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), medians of {options.repeats} steps, "
        f"{options.steps} for the time to the cut\n"
    )
    heads = ["forward s", "split s", "full s", "frozen s", "suffix s", "layers s", "gain", "new us", "known us"]
    print("| case |", " | ".join(heads), "|\n|---|" + "---|" * len(heads))
    for name, case in CASES.items():
        if not options.cases or any(word.lower() in name.lower() for word in options.cases):
            print(f"| {name} |", " | ".join(measure(case, options)), "|", flush=True)


if __name__ == "__main__":
    main()
