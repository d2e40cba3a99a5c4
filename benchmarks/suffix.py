"""How much memory a run takes: does it hold the layers before the cut, or only the suffix?

    python benchmarks/suffix.py                       # Llamas of 24 and 48 blocks of 1,024, cut so that 6 blocks train

Networks are random and saved in bfloat16. Each is encoded by `recycle encode` and trained by `recycle train`, in
processes of their own; shown is the largest resident memory of `train`, against the suffix in float32 with its
gradients and the two averages of AdamW, plus what `import torch` takes alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import apart
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

TRAINED_COPIES = 4
"""float32 values for each weight that trains: the weight, its gradient, and two averages of AdamW."""
TARGET_MB = 300
LIBRARIES = """
import torch, accelerate, dvclive
from transformers import LlamaForSequenceClassification
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
"""
"""What any training of a Llama imports; torch's optimizers import its compiler."""
STARTER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Runs a command from a small process: what a process inherits from the one that starts it counts as its largest."""
PARAMS = """
data: {source: text, path: texts.jsonl, text: text, label: label, validation: 0.25}
model: {backbone: "hf:llama"}
preprocess: {kind: text, max_length: 32}
task: {kind: classification}
encode: {cuts: [CUT], batch_size: 8}
train: {epochs: 1, batch_size: 8}
"""


def main() -> None:
    """Print the largest memory of a run after each network, and what its suffix takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--trained", type=int, default=6, help="blocks that train")
    parser.add_argument("--dir", type=Path, help="where the networks are made, and removed again")
    options = parser.parse_args()
    alone, libraries = (peak(["-c", code], Path()) for code in ("import torch", LIBRARIES))
    print("| blocks | checkpoint | suffix with AdamW | import torch | train, largest | beyond both |")
    print("|---|---|---|---|---|---|")
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory(dir=options.dir) as name:
            folder, cut = Path(name), str(1 - options.trained / blocks)
            apart(make, folder, blocks, options.width, cut)
            peak(["-m", "stages.cli", "encode"], folder)
            checkpoint = sum(file.stat().st_size for file in (folder / "llama").glob("*.safetensors"))
            suffix = TRAINED_COPIES * trained_bytes(folder / "data/activations" / cut / "suffix/model.safetensors")
            largest = peak(["-m", "stages.cli", "train", "--cut", cut], folder)
        rest = (largest - suffix - alone) / 1e6
        sizes = [f"{size / 1e6:,.0f} MB" for size in (checkpoint, suffix, alone, largest)]
        print(f"| {blocks} | {' | '.join(sizes)} | {rest:+.0f} MB |", flush=True)
    print(f"\ntarget: at most +{TARGET_MB} MB for any number of blocks before the cut, of which the imports of")
    print(f"transformers, accelerate, DVCLive and torch's AdamW alone take {(libraries - alone) / 1e6:+.0f} MB")


def make(folder: Path, blocks: int, width: int, cut: str) -> None:
    """Write a project with a random Llama, and 32 texts, to `folder`."""
    words = [f"word{number}" for number in range(200)]
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    make_tokenizer: Any = PreTrainedTokenizerFast
    make_tokenizer(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    ).save_pretrained(folder / "llama")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    network: Any = LlamaForSequenceClassification
    network(config).bfloat16().save_pretrained(folder / "llama")
    lines = [{"text": " ".join(words[i : i + 12]), "label": "ab"[i % 2]} for i in range(32)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "params.yaml").write_text(PARAMS.replace("CUT", cut))


def peak(arguments: list[str], folder: Path) -> int:
    """Return the largest resident memory, in bytes, of Python with `arguments`, run in `folder`."""
    command = [sys.executable, "-c", STARTER, sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} ended with {done.returncode}:\n{done.stderr}")
    return int(done.stdout) * 1024


def trained_bytes(file: Path) -> int:
    """Return the bytes of the weights in a file once they are in float32."""
    with safe_open(file, framework="pt") as opened:
        return sum(4 * opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
