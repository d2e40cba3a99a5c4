"""Every causal language model of transformers with its own head, tiny and random: the types of its mapping."""

from torch import Generator, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.models.language import LanguageModel, as_language_model
from pipeline.tasks import Head
from zoo.catalogue import Entry
from zoo.sizes import without_weights
from zoo.transformers_models import INNER, KINDS, LATENT, WIDTH, WORDS, Inputs, small, text, types

EXPERTS = {"num_experts_per_token": 2}

INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

LAYER_TABLES = {"vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8}
"""Each layer has token embeddings of its own."""

SHARED_KEYS = {
    **LAYER_TABLES,
    "intermediate_size": INNER,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "laurel_rank": 8,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
"""The last layer takes keys and values of the one before it that is of its type."""

SHARED_ATTENTION = {"layers_block_type": ["linear_attention", "hybrid"] * 2}

TO_GLOBAL = {"hidden_size_global": WIDTH}

ADAPTER = {"adapter_out_dim": WIDTH}

ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

OWN = types(
    bailing_hybrid={**EXPERTS, "num_expert_group": 1},
    blt={"encoder_hash_byte_group_vocab": WORDS, "encoder_config": TO_GLOBAL, "decoder_config": TO_GLOBAL},
    cohere_compass_text={"rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY}},
    dbrx={"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": INNER}},
    dots3_note={
        "text_config": LATENT,
        "vision_config": {**ADAPTER, "adapter_in_dim": WIDTH, "num_hidden_layers": 42},
        "audio_config": {**ADAPTER, "adapter_input_size": WIDTH},
    },
    dots3_note_text=LATENT,
    gemma3n={"text_config": SHARED_KEYS, "vision_config": {"architecture": "resnet18"}},
    gemma3n_text=SHARED_KEYS,
    gemma4={"text_config": LAYER_TABLES},
    gemma4_text=LAYER_TABLES,
    hunyuan_v1_moe={"head_dim": 8},
    inkling2_text={"unpadded_vocab_size": WORDS},
    inkling2_loop_text={"unpadded_vocab_size": WORDS},
    kimi_linear=EXPERTS,
    lfm2_moe={"layer_types": ["conv", "full_attention"] * 2},
    longcat_flash={**LATENT, "ffn_hidden_size": INNER, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    qwen4_exp={"text_config": INDEXER},
    qwen4_exp_text=INDEXER,
    reformer={"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False, "attention_head_size": 8},
    sarvam_mla=LATENT,
    xlm={"causal": True},
    zamba=SHARED_ATTENTION,
    zamba2=SHARED_ATTENTION,
)
"""Settings of types that have none elsewhere, or that look ahead without them."""

SETTINGS = {name: settings for table, _ in KINDS for name, settings in table.items()}


def entries() -> list[Entry]:
    """Return every type for which the library has a causal language model."""
    return [entry(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


def entry(name: str) -> Entry:
    """Return the row of a type, which says whether its head is tied."""
    tied: list[bool] = []

    def make() -> nn.Module:
        model = language_model(name)
        tied[:] = [model.is_tied]
        return model

    def member() -> str:
        return "".join("tied" if one else "not tied" for one in tied)

    return Entry("transformers language models", name, make, example, member=member)


def language_model(name: str) -> LanguageModel:
    """Return a network that gives the loss of each token, as task `lm` has it; types with the option are decoders."""
    kind = CONFIG_MAPPING[name]
    decoder = {"is_decoder": True} if "is_decoder" in vars(kind()) else {}

    def build() -> nn.Module:
        network: nn.Module = AutoModelForCausalLM.from_config(
            small(kind, {**decoder, **SETTINGS.get(name, {}), **OWN.get(name, {})})
        )
        return network

    return as_language_model(build(), without_weights(build), Head("language"))


def example(size: int) -> Inputs:
    """Texts of which every token but the first counts."""
    inputs = text(size, Generator().manual_seed(size))
    return {**inputs, "completion_mask": inputs["attention_mask"]}
