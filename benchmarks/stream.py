"""Weights that stay in their files while texts are encoded: the memory it takes, and the rate.

    python benchmarks/stream.py --gb 26 --placements stream       # larger than this machine's memory: peak memory
    python benchmarks/stream.py --gb 4                            # streamed against in memory: rate, and the same bytes

A random Llama of that size is written to --dir, block by block, and removed again. Each side is an encode of its own
process, with the split and its proof; the rate is that of its forward passes, and RssAnon the largest seen in between.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from measuring import apart, status
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.device import matrix_peak
from pipeline.keys import content_key
from pipeline.memory import keep_freed_memory
from pipeline.project import Project
from pipeline.workflows.encode import encode_views, open_encode
from pipeline.workflows.train import train_project

WORDS = 1000
MOST_TOKENS = 2048
INTERVAL = 0.01
"""Seconds between two looks at the memory."""


class Encoded(NamedTuple):
    """An encode: seconds of its forward passes and of all of it, operations, bytes, and the digest of its segments."""

    forward: float
    seconds: float
    flops: int
    start: int
    largest: int
    digest: str


def main() -> None:
    """Print memory and rate of each placement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the weights in bfloat16")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--batch", type=int, default=8, help="texts per forward pass")
    parser.add_argument("--cut", type=float, default=0.9)
    parser.add_argument("--placements", nargs="+", default=["memory", "stream"], choices=["memory", "stream"])
    parser.add_argument("--rounds", type=int, default=1, help="encodes of each placement, in turn; the fastest counts")
    parser.add_argument("--train", action="store_true", help="train the top from the store too")
    parser.add_argument("--dir", type=Path, help="where the weights and the stores are made, and removed again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        block = write_checkpoint(folder / "net", options.gb * 1e9, options.width)
        write_texts(folder / "texts.jsonl", options.texts, options.tokens)
        peak = apart(matrix_peak, torch.device("cpu"), torch.bfloat16)
        print(f"blocks of {block / 1e9:.2f} GB; {peak / 1e9:.0f} GFLOP/s in a product of matrices in bfloat16")
        print("| weights | RssAnon at the start | largest | all of it | forward | GFLOP/s | of the peak |")
        print("|---|---|---|---|---|---|---|")
        best: dict[str, Encoded] = {}
        for _ in range(options.rounds):
            for placement in options.placements:
                found = Encoded(*apart(encode, folder, placement, options.cut, options.batch))
                best[placement] = min(best.get(placement, found), found)
        for placement, found in best.items():
            rate = found.flops / found.forward
            print(
                f"| {placement} | {found.start / 1e9:.2f} GB | {found.largest / 1e9:.2f} GB | {found.seconds:.1f} s | "
                f"{found.forward:.2f} s | {rate / 1e9:.0f} | {rate / peak:.2f} |"
            )
        if options.train:
            start, largest = apart(train, folder, options.cut)
            print(f"\ntraining the top: RssAnon {start / 1e9:.2f} GB at the start, {largest / 1e9:.2f} GB at most")
        if len(best) == 2:
            memory, stream = best["memory"], best["stream"]
            same = "the same" if memory.digest == stream.digest else "OTHER"
            print(f"\nstreamed: {memory.forward / stream.forward:.2f} of the rate in memory (0.95), {same} bytes")


def write_checkpoint(folder: Path, size: float, width: int) -> int:
    """Write a random Llama of about `size` bytes in bfloat16, a file for each block; return the bytes of a block."""
    heads = max(width // 128, 1)
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=heads,
        num_key_value_heads=next(n for n in (8, 4, 2, 1) if heads % n == 0),
        pad_token_id=0,
        dtype=torch.bfloat16,
        architectures=["LlamaForSequenceClassification"],
    )
    with torch.device("meta"):
        shapes = {name: item.shape for name, item in LlamaDecoderLayer(config, 0).state_dict().items()}
    block = 2 * sum(shape.numel() for shape in shapes.values())
    config.num_hidden_layers = max(round(size / block), 4)
    config.save_pretrained(folder)
    files = {f"model.layers.{i}.": shapes for i in range(config.num_hidden_layers)}
    files["model."] = {"embed_tokens.weight": torch.Size((WORDS + 1, width)), "norm.weight": torch.Size((width,))}
    index: dict[str, str] = {}
    for number, (prefix, held) in enumerate(files.items()):
        torch.manual_seed(number)
        tensors = {f"{prefix}{name}": _random(shape) for name, shape in held.items()}
        save_file(tensors, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{number:05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = Tokenizer(WordLevel({"[PAD]": 0} | {f"w{i}": i + 1 for i in range(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder)
    return int(block)


def _random(shape: torch.Size) -> Tensor:
    if len(shape) == 1:  # of a norm
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def write_texts(file: Path, texts: int, tokens: int) -> None:
    """Write texts of so many tokens."""
    numbers = torch.randint(WORDS, (texts, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [{"text": " ".join(f"w{i}" for i in one), "label": str(number % 2)} for number, one in enumerate(numbers)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def encode(folder: Path, placement: str, cut: float, batch: int) -> tuple[Any, ...]:
    """Encode the texts from scratch, and return the fields of `Encoded`."""
    os.chdir(folder)
    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings: dict[str, Any] = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "model": {"backbone": "hf:net"},
        "preprocess": {"kind": "text", "max_length": MOST_TOKENS},
        "task": {"kind": "classification"},
        "encode": {"cuts": [cut], "batch_size": batch, "placement": placement, "dtype": "bfloat16", "workers": 0},
        "train": {"epochs": 1, "batch_size": 4, "adapter": {}, "dtype": "bfloat16", "gradient_checkpointing": True},
    }
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    shutil.rmtree("data", ignore_errors=True)
    project = Project.load(Path("params.yaml"))
    source = project.source()
    keyed = project.keys_of(source)
    table = project.sample_table(source, keyed)
    with _largest_memory() as found:
        began = time.perf_counter()
        opened = open_encode(project, source, keyed, table, replace_stores=True)
        result = encode_views(opened.encoder(source, keyed), project, source, keyed, table, opened.stores)
        seconds = time.perf_counter() - began
    table.write(project.samples)
    ((flops, _),) = opened.loaded.count_flops(opened.prefixes, opened.samples) or [(0, 0)]
    files = sorted(path for path in Path("data/activations").rglob("*") if path.is_file())
    digest = content_key([[path.as_posix(), path.read_bytes()] for path in files]).hex()
    return sum(result.costs.forward.values()), seconds, flops * len(table), *found, digest


def train(folder: Path, cut: float) -> tuple[int, int]:
    """Train the top of the network from the store; return RssAnon at the start, and the largest."""
    os.chdir(folder)
    keep_freed_memory()
    with _largest_memory() as found:
        train_project(Project.load(Path("params.yaml")), str(cut))
    return found[0], found[1]


@contextmanager
def _largest_memory() -> Iterator[list[int]]:
    """Yield a list that has, at the end, RssAnon at the start and the largest since, in bytes."""
    found = [status("RssAnon")] * 2
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(INTERVAL):
            found[1] = max(found[1], status("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
