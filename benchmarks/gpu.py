"""Encode and train on an accelerator, against the same from its own memory: every figure in one JSON file.

    make gpu PYTHON=python3        # benchmarks/gpu.json, in less than ten minutes, without a network

Encode: keying, reading, the forward pass and a store on disk against the bare prefix on batches in device memory.
Train: the inner loop of `recycle train` fed from the states in device memory (resident) and from the store (host)
against the very batches in device memory. Sides take turns; medians. "busy" is the time of the device's kernels in one
profiled pass over the median time of a pass, null where torch cannot profile the device. Shares of the peak count the
operations of the layers before the cut (encode), or three times those after it (train), against a bf16 matrix product
measured in the same run.
"""

import argparse
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DIGITS, Encoding
from measuring import Report, busy_seconds, median_seconds
from networks import networks
from torch import nn

from pipeline.data import build
from pipeline.device import matrix_peak, pick_device
from pipeline.encode.config import EncodeConfig
from pipeline.encode.encoder import compute_format
from pipeline.split.forward import eval_mode
from pipeline.store import Reader, Store
from pipeline.tasks import Task, TaskConfig, open_task
from pipeline.train import order
from pipeline.train.adapter import adapt
from pipeline.train.config import AdapterConfig, TrainConfig
from pipeline.train.fit import open_accelerator, train_round
from pipeline.train.loader import Batch, Loader, StoredRows, choose_source
from pipeline.train.objective import Objective, prepare
from pipeline.train.optimizer import open_optimizer, schedule
from pipeline.train.rounds import Batches, Rounds

KINDS = ("fp32", "bf16", "compiled", "lora")
"""Ways to train; the last two in bf16."""
COMPILED = ("cuda", "xpu", "cpu")
"""Devices that torch's own compiler makes code for; on others, compiled modules run as they are."""


def compiled(module: nn.Module, device: torch.device) -> Any:
    """Return `module` compiled; as it is where torch's compiler makes no code for the device."""
    return torch.compile(module, backend="inductor" if device.type in COMPILED else "eager")


def busy(sides: Mapping[str, Callable[[], object]], device: torch.device, seconds: Mapping[str, float]) -> Any:
    """Return for each side the share of its seconds in which kernels run, measured in one more pass."""
    return {
        name: None if (kernels := busy_seconds(run, device)) is None else kernels / seconds[name]
        for name, run in sides.items()
    }


def encode_row(encoding: Encoding, folder: Path, peak: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Encode into `folder`, whose last store stays, and run the bare prefix on a quarter of the samples."""
    config, device, count, few = (
        encoding.config,
        encoding.device,
        len(encoding.source),
        max(len(encoding.source) // 4, 1),
    )
    form = compute_format([encoding.prefix], config)
    batches = [form.inputs(batch) for batch in encoding.batches(few)]

    def over_batches(run: Callable[..., object]) -> None:
        with torch.no_grad(), eval_mode(encoding.backbone.model):
            for batch in batches:
                form.run(run, batch)

    def whole() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        encoding.encode(folder)

    sides: dict[str, Callable[[], object]] = {"bare": partial(over_batches, encoding.prefix), "encode": whole}
    if config.cuts == [1.0]:  # the whole network but its head, as fast as torch makes it
        sides["compiled"] = partial(over_batches, compiled(encoding.backbone.model, device))
    seconds = median_seconds(sides, device, options.repeats)
    rates = {name: (count if name == "encode" else few) / taken for name, taken in seconds.items()}
    flops = encoding.flops[0][0] if encoding.flops else None
    return {
        "samples_per_second": rates,
        "ratio": {name: rates["encode"] / rate for name, rate in rates.items() if name != "encode"},
        "busy": busy(sides, device, seconds),
        "share_of_peak": {name: rate * flops / peak for name, rate in rates.items()} if flops and peak else None,
        "seconds_per_sample": encoding.result.costs.of(0)["seconds_per_sample"],
    }


class Held(list[Batch]):
    """The batches of an epoch, kept."""

    def set_epoch(self, epoch: int, start: int = 0, end: int | None = None) -> None:
        """Every epoch is the same."""


def feeds(encoding: Encoding, folder: Path, task: Task, options: argparse.Namespace) -> dict[str, Batches]:
    """Return what feeds training: the batches in device memory, the states there, and the store through the host."""
    store, table = Store.open(folder), build(encoding.source, encoding.result.keyed.keys, DIGITS)
    task.head(table)
    rows = np.arange(min(len(table), options.steps * options.batch))
    batches = order.batches(rows, options.batch, seed=0, epoch=0, shuffle=True)
    places, reader, targets = store.rows(table.keys), Reader(store.path), task.prepare(table)
    resident, host = (
        Loader(StoredRows(places, source), targets, batches, device=encoding.device)
        for source in (choose_source(places, reader, encoding.device, "device"), reader)
    )
    return {"memory": Held(resident), "resident": resident, "host": host}


def train_row(
    encoding: Encoding,
    get_fed: Callable[[], Mapping[str, Batches]],
    task: Task,
    peak: float | None,
    kind: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    fed = get_fed()
    device, fresh, suffix = encoding.device, encoding.backbone.fresh, encoding.suffix
    config = TrainConfig(precision="no" if kind == "fp32" else "bf16", lr=1e-5, batch_size=options.batch)
    accelerator = open_accelerator(config, Path(tempfile.gettempdir()))
    module: nn.Module = compiled(suffix, device) if kind == "compiled" else suffix
    if kind == "lora":
        batch = next(iter(fed["memory"]))
        module = adapt(encoding.backbone.model, suffix, batch.state, batch.inputs, AdapterConfig(), fresh=fresh, seed=0)
    objective = Objective(module, task)
    model = prepare(objective, fed["memory"], accelerator)
    rounds = Rounds.of(config, len(fed["memory"]))
    optimizer = open_optimizer(objective, config, fresh)
    optimizer, scheduler = accelerator.prepare(optimizer, schedule(optimizer, config, rounds.steps))
    passes = {
        name: partial(train_round, model, batches, optimizer, scheduler, accelerator, config, rounds, 0)
        for name, batches in fed.items()
    }
    seconds = median_seconds(passes, device, options.repeats)
    samples = sum(len(batch.rows) for batch in fed["memory"])
    rates = {name: samples / taken for name, taken in seconds.items()}
    flops = encoding.flops and kind != "lora" and 3 * encoding.flops[0][1]
    return {
        "samples_per_second": rates,
        "ratio": {name: rates[name] / rates["memory"] for name in ("resident", "host")},
        "busy": busy(passes, device, seconds),
        "share_of_peak": {name: rate * flops / peak for name, rate in rates.items()} if flops and peak else None,
    }


def measure(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """Fill the report: the peak, then for each network its encodes at two cuts, and its training from the first."""
    device = report.device
    row = report.add(
        "peak", f"bf16, {options.matrix}^3", lambda: {"flops": matrix_peak(device, torch.bfloat16, options.matrix)}
    )
    peak = row.get("flops")
    for name, network in networks(options).items():
        backbone, task = network.backbone(), open_task(TaskConfig())
        report.content.setdefault("weights", {})[name] = network.weights
        for cut, samples in ((0.5, options.samples // 2), (1.0, options.samples)):
            config = EncodeConfig(
                cuts=[cut], batch_size=options.batch, workers=options.workers, channels_last=network.channels_last
            )
            encoding = Encoding(network.source(samples), backbone, config, device)
            for precision in ("float32", "bfloat16"):
                encoding.config = config.model_copy(update={"precision": precision})
                row = partial(encode_row, encoding, folder / "store", peak, options)
                report.add("encode", f"{name}, cut {cut}, {precision}", row)
            if cut == 0.5:
                fed = functools.cache(partial(feeds, encoding, folder / "store", task, options))
                for kind in KINDS:
                    row = partial(train_row, encoding, fed, task, peak, kind, options)
                    report.add("train", f"{name}, cut {cut}, {kind}", row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpu.json"))
    parser.add_argument("--seconds", type=float, default=480, help="time limit: no row starts after it")
    parser.add_argument("--samples", type=int, default=8192, help="at the cut 1.0, half as many at 0.5")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16, help="batches of a pass of training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None, help="processes that read and preprocess")
    parser.add_argument("--images", default="torchvision:resnet50")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--matrix", type=int, default=8192)
    return parser.parse_args()


def main() -> None:
    """Write the report; exit with 1 if something could not be measured."""
    options = parse()
    device = pick_device("auto")
    if device.type == "cpu":
        raise SystemExit("torch finds no accelerator here, and this measures one; nothing is written")
    report = Report(options.out, device, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        measure(report, options, Path(folder))
    if not report.complete:
        raise SystemExit(f"{options.out} has rows that could not be measured; each says why")


if __name__ == "__main__":
    main()
