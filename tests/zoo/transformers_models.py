"""Model types of transformers, tiny and random: each type's own configuration, with small numbers in it.

`SMALL` says what a setting of a given name is in every model that has it; the tables below name the types by the kind
of their inputs, with the settings of a type in which those values contradict each other.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig

from zoo.catalogue import Entry

logging.getLogger("transformers").setLevel(logging.ERROR)

WORDS = 100
IMAGE_TOKEN = WORDS - 1
LENGTHS = (9, 13, 5)
"""Tokens per sample; no model has an axis of the padded length, so that an axis of it is one of tokens."""
LAYERS, HEADS, WIDTH, INNER = 4, 4, 32, 64

SMALL: dict[str, Any] = {
    "use_cache": False,
    **dict.fromkeys(("vocab_size", "text_vocab_size", "entity_vocab_size"), WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
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
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 64),
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
    **dict.fromkeys(("num_queries", "num_detection_tokens"), 10),
    "attention_window": 4,
    "mm_tokens_per_image": 4,
    "conv_dim": WIDTH,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    **dict.fromkeys(("mamba_n_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("mamba_d_state", "state_size", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_d_ssm": INNER,
    "mamba_num_heads": HEADS,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "ssm_state_size"), 16),
}

UNSET = frozenset({"use_cache", "pad_token_id", "bos_token_id", "eos_token_id"})
"""Settings that are given a value even where a type has none."""

Settings = dict[str, Any]
Inputs = dict[str, Tensor]


def types(names: str = "", **others: Settings) -> dict[str, Settings]:
    """Return a table of the types in `names`, which need no settings of their own, and of `others`, which do."""
    return {**{name: {} for name in names.split()}, **others}


LATENT = {"num_key_value_heads": HEADS}
"""Latent attention has as many heads for keys as for queries."""

MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}

ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
"""Positions in time, height and width share the half of a head."""

TEXT = types(
    "afmoe albert apertus arcee beam bert bert-generation big_bird biogpt bitnet bloom camembert clip_text_model"
    " cohere cohere2 cohere2_moe convbert cwm data2vec-text deberta deberta-v2 diffllama distilbert doge dpr electra"
    " embedding_gemma2_text ernie ernie4_5 ernie4_5_moe eurobert exaone4 exaone_moe falcon falcon_h1 falcon_mamba"
    " flaubert flex_olmo flint fnet gemma gemma2 gemma3_text gemma4_unified_text glm glm4 glm4_moe gpt2 gpt_bigcode"
    " gpt_neox gpt_neox_japanese gpt_oss granite granite_docling_text granite_swa granitemoe granitemoe_swa"
    " granitemoeshared gte helium hrm_text hy_v3 hy_v4 hyperclovax ibert jais2 jamba jetmoe jina_embeddings_v3"
    " kolibri1 laguna lfm2 lfm3 llama llama4_text longformer luke mamba megatron-bert mellum mimo_v2_flash minimax"
    " minimax_m2 ministral3 mistral mixtral modernbert modernbert-decoder molmo2_text mpnet mpt mra nanochat"
    " nomic_bert nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt openai_privacy_filter opt persimmon phi"
    " phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next qwen3_vl_text recurrent_gemma rembert"
    " roberta roberta-prelayernorm roformer rwkv seed_oss smollm3 solar_open splinter squeezebert stablelm"
    " starcoder2 tapas tipsv2_text_model ultrabert vaultgemma xglm xlm xlm-roberta xlm-roberta-xl xlnet yoso",
    axk1=LATENT,
    axk2=LATENT,
    bamba={"attn_layer_indices": [1]},
    canine={"num_hash_buckets": 64},
    codegen={"rotary_dim": 4},
    cpmant={"dim_head": 8, "dim_ff": INNER, "prompt_length": 4},
    ctrl={"dff": INNER},
    deepseek_v2={**LATENT, **MIXTURE},
    deepseek_v32=LATENT,
    deepseek_v3=LATENT,
    dots1=MIXTURE,
    esm={"vocab_size": WORDS},
    esmc=LATENT,
    funnel={"architectures": ["FunnelModel"], "block_sizes": [1, 1, 2]},
    glm4_moe_lite=LATENT,
    glm4v_text=ROTARY,
    glm_moe_dsa=LATENT,
    gpt_neo={"attention_types": [[["global", "local"], LAYERS // 2]]},
    gptj={"rotary_dim": 4},
    granitemoehybrid={"layer_types": ["mamba", "attention"] * 2},
    hunyuan_v1_dense={"head_dim": 8},
    mamba2={"head_dim": 16, "n_groups": 1},
    markuplm={"max_depth": 4},
    minicpm3=LATENT,
    ministral={"head_dim": 8},
    mistral4={**LATENT, "head_dim": 16},
    mobilebert={"intra_bottleneck_size": 16},
    nemotron={"num_key_value_heads": 2},
    nemotron_h={"n_groups": 1},
    qwen2_5_vl_text=ROTARY,
    qwen2_vl_text=ROTARY,
    roformer={
        "vocab_size": 40 * WORDS
    },  # of so many weights, its table of positions is as small a share as in real ones
    roc_bert={"pronunciation_vocab_size": WORDS, "shape_vocab_size": WORDS},
    xmod={"default_language": "en_XX"},
    youtu=LATENT,
    zaya={"num_experts_per_tok": 1},
)

TEXT_TO_TEXT = types(
    "bart bigbird_pegasus blenderbot blenderbot-small led m2m_100 marian mbart mt5 mvp nllb-moe pegasus plbart"
    " switch_transformers t5 t5gemma umt5",
    pegasus_x={"block_size": 4},
)

PLACED_TEXT = types(
    "layoutlm", bros={"dim_bbox": 4}, lilt={"hidden_size": 48}, layoutlmv3={"coordinate_size": 6, "shape_size": 4}
)

PYRAMID = {"patch_size": 4}
"""A pyramid starts from small patches."""

WINDOWS = {**PYRAMID, "embed_dim": 8, "window_size": 2}

BRANCHES = {"num_attention_heads": [1, 2, 2, 4]}

TINY_EFFICIENTNET = {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.5}

IMAGES = types(
    "aimv2_vision_model beit chinese_clip_vision_model clip_vision_model cvt data2vec-vision deit dinov2"
    " dinov2_with_registers dinov3_convnext dinov3_vit dpt glpn ijepa mlcd_vision_model pixio poolformer resnet"
    " segformer siglip_vision_model tipsv2_vision_model vit vit_msn vitdet yolos",
    bit={"num_groups": 8},
    convnext=PYRAMID,
    convnextv2=PYRAMID,
    efficientnet=TINY_EFFICIENTNET,
    focalnet={**PYRAMID, "embed_dim": 8},
    hiera={"patch_size": [7, 7], "embed_dim": 8},
    levit={"num_attention_heads": [2, 2, 4]},
    mobilenet_v1={"depth_multiplier": 0.25},
    mobilenet_v2={"depth_multiplier": 0.35},
    mobilevit={"patch_size": 2, "neck_hidden_sizes": [16, 16, 24, 32, 40, 48, 64]},
    mobilevitv2={"patch_size": 2, "base_attn_unit_dims": [32, 48, 64]},
    pvt=BRANCHES,
    pvt_v2=BRANCHES,
    regnet={"groups_width": 16},
    swin=WINDOWS,
    swin2sr={"patch_size": 1, "image_size": 16},
    swinv2=WINDOWS,
    swiftformer={"embed_dims": [16, 24, 32, 48]},
    textnet={
        "conv_layer_kernel_sizes": [[[3, 3]] * 2] * 4,
        "conv_layer_strides": [[1, 2]] * 4,
        "stem_out_channels": 16,
        "hidden_sizes": [16] * 5,
    },
    vit_mae={},
    **{"donut-swin": WINDOWS, "maskformer-swin": WINDOWS},
)

RESNET = {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}

DETECTION = types(
    conditional_detr=RESNET,
    deformable_detr={"backbone_config": {"model_type": "resnet", "out_features": ["stage3", "stage4"]}},
    detr=RESNET,
    maskformer={"fpn_feature_size": 32, "mask_feature_size": 32, "backbone_config": WINDOWS},
    **{"table-transformer": RESNET, "dab-detr": RESNET},
)

VIDEOS = types("timesformer videomae vivit")

NAMED_VIDEOS = types(
    "videoprism_vision_model",
    vjepa2={
        "crop_size": 64,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
    },
)

WAVES = types("data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm")

SPECTROGRAMS = types(**{"audio-spectrogram-transformer": {"max_length": 64}})

FEATURES = types(**{"wav2vec2-bert": {"feature_projection_input_dim": 16}})

FEATURES_TO_TEXT = types(speech_to_text={"input_feat_per_channel": 16, "conv_channels": 16})

BANDS_FIRST = types("glmasr_encoder qwen2_audio_encoder voxtral_encoder")

BANDS_FIRST_TO_TEXT = types("whisper")

WAVES_TO_TEXT = types("moonshine")

SERIES = types("patchtsmixer", patchtst={"patch_length": 4, "patch_stride": 4})

TEXT_AND_IMAGE = types(
    "aimv2 altclip blip chinese_clip clip clipseg flava git groupvit metaclip_2 siglip vilt",
    align={"vision_config": TINY_EFFICIENTNET, "projection_dim": 80},
    bridgetower={"vision_config": {"hidden_size": 64}},
    **{"vision-text-dual-encoder": {"vision_config": {}, "text_config": {}}},
)

COARSE = {"vision_config": {"patch_size": 32}}
"""Four patches of an image, each of which takes the place of a token."""

IMAGE_IN_TEXT = types(
    "aya_vision gemma3 internvl",
    cohere2_vision={"alignment_intermediate_size": INNER},
    llava={**COARSE, "vision_feature_layer": -2},
    paligemma={**COARSE, "projection_dim": WIDTH},
    vipllava={**COARSE, "vision_feature_layers": [-2, -3]},
)

Draw = Callable[[int, Generator], Inputs]
"""Draws the inputs of so many samples."""

IMAGE = (3, SMALL["image_size"], SMALL["image_size"])
VIDEO = (SMALL["num_frames"], *IMAGE)
WAVE = (4000,)
FRAMES, BANDS = 64, SMALL["num_mel_bins"]


def numbers(**shapes: tuple[int, ...]) -> Draw:
    """Draw inputs of these names and shapes: images, waveforms, spectrograms."""
    return lambda size, draw: {name: torch.randn(size, *shape, generator=draw) for name, shape in shapes.items()}


def both(*parts: Draw) -> Draw:
    """Draw the inputs of all `parts`."""
    return lambda size, draw: {name: tensor for part in parts for name, tensor in part(size, draw).items()}


def text(size: int, draw: Generator) -> Inputs:
    """Token ids of unequal lengths, padded on the right, with their mask."""
    lengths = torch.tensor(LENGTHS[:size])[:, None]
    mask = (torch.arange(max(LENGTHS)) < lengths).long()
    words = torch.randint(3, IMAGE_TOKEN, (size, max(LENGTHS)), generator=draw)
    return {"input_ids": words * mask, "attention_mask": mask}


def text_around_image(size: int, draw: Generator) -> Inputs:
    """A text that starts with the places of the four tokens of an image."""
    inputs = text(size, draw)
    inputs["input_ids"][:, :4] = IMAGE_TOKEN
    return inputs


def boxes(size: int, draw: Generator) -> Inputs:
    """The box of each token on the page."""
    corners = torch.randint(0, 60, (size, max(LENGTHS), 2), generator=draw)
    return {"bbox": torch.cat([corners, corners + 3], -1)}


def said(size: int, draw: Generator) -> Inputs:
    """Token ids for a decoder."""
    return {"decoder_input_ids": torch.randint(3, IMAGE_TOKEN, (size, 7), generator=draw)}


KINDS: tuple[tuple[dict[str, Settings], Draw], ...] = (
    (TEXT, text),
    (TEXT_TO_TEXT, both(text, said)),
    (PLACED_TEXT, both(text, boxes)),
    (IMAGES, numbers(pixel_values=IMAGE)),
    (DETECTION, numbers(pixel_values=IMAGE)),
    (VIDEOS, numbers(pixel_values=VIDEO)),
    (NAMED_VIDEOS, numbers(pixel_values_videos=VIDEO)),
    (WAVES, numbers(input_values=WAVE)),
    (WAVES_TO_TEXT, both(numbers(input_values=WAVE), said)),
    (SPECTROGRAMS, numbers(input_values=(FRAMES, BANDS))),
    (FEATURES, numbers(input_features=(FRAMES, BANDS))),
    (FEATURES_TO_TEXT, both(numbers(input_features=(FRAMES, BANDS)), said)),
    (BANDS_FIRST, numbers(input_features=(BANDS, FRAMES))),
    (BANDS_FIRST_TO_TEXT, both(numbers(input_features=(BANDS, FRAMES)), said)),
    (SERIES, numbers(past_values=(32, 1))),
    (TEXT_AND_IMAGE, both(text, numbers(pixel_values=IMAGE))),
    (IMAGE_IN_TEXT, both(text_around_image, numbers(pixel_values=IMAGE))),
)


def entries() -> list[Entry]:
    """Return the types of all tables that the installed version of the library has."""
    return [
        entry(name, settings, inputs)
        for table, inputs in KINDS
        for name, settings in table.items()
        if name in CONFIG_MAPPING
    ]


def entry(name: str, settings: Settings, inputs: Draw) -> Entry:
    """Return the row of a type: its base model, and batches drawn from their size."""

    def make() -> nn.Module:
        return AutoModel.from_config(small(CONFIG_MAPPING[name], settings))

    def example(size: int) -> Inputs:
        return inputs(size, Generator().manual_seed(size))

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
            own = dict(settings.pop(name, {}))
            other = own.pop("model_type", None)
            values[name] = small(CONFIG_MAPPING[other] if other else type(default[name]), own)
    return kind(**{**values, **settings})


def fitted(value: Any, default: Any) -> Any:
    """Return `value` as a list of the length of `default` where that is one: a setting of each stage."""
    if not isinstance(default, list | tuple):
        return value
    return list(value[: len(default)]) if isinstance(value, tuple) else [value] * len(default)
