"""GGUF files as backbones."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.models import ModelConfig, PreprocessConfig, as_described, describe, load
from pipeline.tasks import Head

TOKENS = ["<end>", *"abcdefgh", "ab", "Ġ"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Write a Llama as llama.cpp does: other names, and the rows of queries and keys in another order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (len(TOKENS) - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    for name, item in model.state_dict().items():
        values = item.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = values.reshape(2, 2, 4, -1).swapaxes(1, 2).reshape(values.shape)
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_is_read_described_and_saved_as_a_plain_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    write_gguf(tmp_path / "tiny.gguf", model)
    config, preprocess = ModelConfig(backbone=f"hf:{tmp_path}/tiny.gguf"), PreprocessConfig(max_length=16)
    backbone = load(config, preprocess, Head("language"))
    sample = backbone.preprocess("ab cad")
    batch = {name: item[None] for name, item in sample.items()}
    expected = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.item()
    output = backbone.model.eval()(**batch)
    assert output[..., 0].sum().item() / output[..., 2].sum().item() == pytest.approx(expected, rel=1e-5)
    (tmp_path / "saved").mkdir()
    backbone.save(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(saved.config, "quantization_config")
    found = saved(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.item()
    assert found == pytest.approx(expected, rel=1e-5)
    (tmp_path / "described").mkdir()
    describe(config, backbone, tmp_path / "described")
    described = load(*as_described(config, preprocess, tmp_path / "described"), Head("language"), features=0)
    assert vars(described.network.config).keys() == vars(backbone.network.config).keys()
    assert described.preprocess.recipe() == backbone.preprocess.recipe()
    assert torch.equal(described.preprocess("ab cad")["input_ids"], sample["input_ids"])
