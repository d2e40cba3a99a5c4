"""Tiny causal networks with their tokenizer, and projects of language models on a few chats and completions."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from pipeline.project import Project

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *NUMBERS, " "]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WIDTHS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **WIDTHS),
    "gpt2": GPT2Config(**SIZES, n_embd=16, n_layer=4, n_head=2, n_positions=32),
    "gemma2": Gemma2Config(**SIZES, **WIDTHS, final_logit_softcapping=2.0, sliding_window=4),
}
"""A plain one, one whose head is tied to the embeddings, and one that is tied and caps its logits."""


def write_network(folder: Path, name: str) -> None:
    """Write a tiny random network of `CONFIGS` and its tokenizer of `WORDS`, in the form of the library."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for item in model.parameters():
            if item.dim() > 1:
                item.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"<\w+>| |\w+"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=None if name == "gpt2" else "<pad>",  # as the real one
        eos_token="<end>",
        model_max_length=24,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_records(folder: Path, count: int = 40) -> None:
    """Write chats, completions and preferences (.jsonl): an answer names the numbers after that of the question."""
    names = NUMBERS
    chats, completions, preferences = [], [], []
    for i in range(count):
        begin, length = i % 7, 1 + i // 7 % 3
        question, answer = names[begin], " ".join(names[begin + 1 : begin + 1 + length])
        if i % 2:
            question = f"{names[i % 10]} {question}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chats.append({"messages": turns, "id": i})
        completions.append({"q": question, "a": f" {answer}"})
        other = [turns[0], turns[1] | {"content": names[i % 3]}]
        preferences.append({**completions[-1], "worse": f" {names[i % 3]}", "chat": turns, "other": other})
    for name, rows in (("chats", chats), ("completions", completions), ("preferences", preferences)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CHAT = {"source": "chat", "path": "chats.jsonl", "messages": "messages"}
PREFERENCES = {
    "source": "completions", "path": "preferences.jsonl", "prompt": "q", "chosen": "a", "rejected": "worse",
}  # fmt: skip
CHAT_PREFERENCES = {"source": "chat", "path": "preferences.jsonl", "chosen": "chat", "rejected": "other"}
COMPLETIONS = {"source": "completions", "path": "completions.jsonl", "prompt": "q", "completion": "a"}


def project(folder: Path, network: str = "llama", **sections: dict[str, Any]) -> Project:
    """Return a project in `folder`, which is the current one, of a network that `write_network` wrote there."""
    settings: dict[str, dict[str, Any]] = {
        "data": {**CHAT, "validation": 0.25},
        "model": {"backbone": f"hf:{folder / network}"},
        "task": {"kind": "lm"},
        "encode": {"cuts": [0.5], "batch_size": 4, "segment_samples": 16, "workers": 0, "dtype": "float32"},
        "train": {"epochs": 3, "batch_size": 4, "lr": 0.003},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section} if name != "data" else {"validation": 0.25, **section}
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    return Project.load(folder / "params.yaml")
