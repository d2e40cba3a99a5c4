"""Model types of transformers, tiny and random: each type's own configuration, with small numbers in it.

`SMALL` says what a setting of a given name is in every model that has it; the tables below name the types by the kind
of their inputs, with the settings of a type in which those values contradict each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig

from zoo.catalogue import Entry

logging.getLogger("transformers").setLevel(logging.ERROR)

WORDS = 100
LENGTHS = (9, 13, 5)
"""Tokens per sample; no model has an axis of the padded length, so that an axis of it is one of tokens."""
LAYERS, HEADS, WIDTH, INNER = 4, 4, 32, 64

SMALL: dict[str, Any] = {
    "use_cache": False,
    **dict.fromkeys(("vocab_size", "text_vocab_size"), WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embed_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    "num_key_value_heads": HEADS // 2,
    **dict.fromkeys(("head_dim", "d_head", "d_kv"), WIDTH // HEADS),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", "d_inner", "n_inner", "mlp_dim"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "sliding_window": 4,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 4,
    "depths": (1, 1, 2, 1),
    "hidden_sizes": (16, 32, 48, 64),
    "projection_dim": 24,
    "num_mel_bins": 16,
    "num_frames": 4,
    "conv_dim": WIDTH,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

UNSET = frozenset({"use_cache", "pad_token_id", "bos_token_id", "eos_token_id"})
"""Settings that are given a value even where a type has none."""

Settings = dict[str, Any]
Inputs = dict[str, Tensor]


def types(names: str, **others: Settings) -> dict[str, Settings]:
    """Return a table of the types in `names`, which need no settings of their own, and of `others`, which do."""
    return {**{name: {} for name in names.split()}, **others}


LATENT = {"num_key_value_heads": HEADS}
"""Latent attention has as many heads for keys as for queries."""

MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}

TEXT = types(
    "afmoe albert apertus arcee beam bert bert-generation big_bird biogpt bitnet bloom camembert clip_text_model cohere"
    " cohere2 cohere2_moe convbert cwm data2vec-text deberta deberta-v2 diffllama distilbert doge dpr electra"
    " embedding_gemma2_text ernie ernie4_5 ernie4_5_moe eurobert exaone4 exaone_moe falcon falcon_mamba gemma gemma2"
    " gpt2 gpt_neox granite ibert llama longformer luke mamba megatron-bert mistral mixtral modernbert mpnet mpt"
    " olmo olmo2 opt phi phi3 qwen2 qwen3 qwen3_moe rembert roberta xlm-roberta xlnet",
    axk1=LATENT,
    axk2=LATENT,
    canine={"num_hash_buckets": 64},
    codegen={"rotary_dim": 4},
    ctrl={"dff": INNER},
    deepseek_v2={**LATENT, **MIXTURE},
    deepseek_v3=LATENT,
    deepseek_v32=LATENT,
    dots1=MIXTURE,
    esm={"vocab_size": WORDS},
    funnel={"architectures": ["FunnelModel"], "block_sizes": [1, 1, 2]},
    gpt_neo={"attention_types": [[["global", "local"], LAYERS // 2]]},
    mobilebert={"intra_bottleneck_size": 16},
)

SEQ2SEQ = types("bart bigbird_pegasus blenderbot blenderbot-small led m2m_100 marian mbart mt5 pegasus t5 umt5")

FINE = {"patch_size": 4}
"""A pyramid starts from small patches."""

IMAGES = types(
    "aimv2_vision_model beit chinese_clip_vision_model clip_vision_model cvt data2vec-vision deit dinov2"
    " dinov2_with_registers dinov3_convnext dinov3_vit dpt poolformer resnet segformer siglip_vision_model vit",
    bit={"num_groups": 8},
    convnext=FINE,
    convnextv2=FINE,
    mobilevit={"patch_size": 2, "neck_hidden_sizes": [16, 16, 24, 32, 40, 48, 64]},
    swin=FINE,
    swinv2=FINE,
    **{"donut-swin": FINE},
)

WAVES = types("data2vec-audio hubert wav2vec2 wavlm")


def text(config: PretrainedConfig, size: int, draw: Generator) -> Inputs:
    """Token ids of unequal lengths, padded on the right, with their mask."""
    lengths = torch.tensor(LENGTHS[:size])[:, None]
    mask = (torch.arange(max(LENGTHS)) < lengths).long()
    words = torch.randint(3, WORDS, (size, max(LENGTHS)), generator=draw)
    return {"input_ids": words * mask, "attention_mask": mask}


def text_pair(config: PretrainedConfig, size: int, draw: Generator) -> Inputs:
    """Token ids for the encoder, and what the decoder has said so far."""
    return {**text(config, size, draw), "decoder_input_ids": torch.randint(3, WORDS, (size, 7), generator=draw)}


def images(config: PretrainedConfig, size: int, draw: Generator) -> Inputs:
    """Square images of the size that the configuration names."""
    pixels = getattr(config, "image_size", SMALL["image_size"])
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.randn(size, channels, pixels, pixels, generator=draw)}


def waves(config: PretrainedConfig, size: int, draw: Generator) -> Inputs:
    """Waveforms of a quarter of a second."""
    return {"input_values": torch.randn(size, 4000, generator=draw)}


KINDS: tuple[tuple[dict[str, Settings], Callable[[PretrainedConfig, int, Generator], Inputs]], ...] = (
    (TEXT, text),
    (SEQ2SEQ, text_pair),
    (IMAGES, images),
    (WAVES, waves),
)


def entries() -> list[Entry]:
    """Return the types of all tables that the installed version of the library has."""
    return [
        entry(name, settings, inputs)
        for table, inputs in KINDS
        for name, settings in table.items()
        if name in CONFIG_MAPPING
    ]


def entry(name: str, settings: Settings, inputs: Callable[[PretrainedConfig, int, Generator], Inputs]) -> Entry:
    """Return the row of a type: its base model, and batches drawn from their size."""

    def make() -> nn.Module:
        return AutoModel.from_config(small(CONFIG_MAPPING[name], settings))

    def example(size: int) -> Inputs:
        return inputs(small(CONFIG_MAPPING[name], settings), size, Generator().manual_seed(size))

    return Entry("transformers", name, make, example)


def small(kind: type[PretrainedConfig], settings: Settings) -> PretrainedConfig:
    """Return a configuration with `settings`, and the small values of all others; a list keeps its length."""
    default = vars(kind())
    settings = dict(settings)
    values: Settings = {}
    for name, value in SMALL.items():
        if name in default and (default[name] is not None or name in UNSET):
            values[name] = fitted(value, default[name])
    for name in kind.sub_configs:
        if isinstance(default.get(name), PretrainedConfig):
            values[name] = small(type(default[name]), settings.pop(name, {}))
    return kind(**{**values, **settings})


def fitted(value: Any, default: Any) -> Any:
    """Return `value` as a list of the length of `default` where that is one: a setting of each stage."""
    if not isinstance(default, list | tuple):
        return value
    return list(value[: len(default)]) if isinstance(value, tuple) else [value] * len(default)
