"""Whatever changes a state changes the recipe: every field of ten families' configurations, every setting of tokenizers
and processors, the user's own code and attributes of any type.

For a field each, a copy of the network is made that differs in this field alone. Where its state differs, so must the
recipe; where it does not build or run, the field could not have led to another state.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    PreTrainedConfig,
    ProphetNetTokenizer,
    SeamlessM4TFeatureExtractor,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from pipeline.models import ModelConfig, PreprocessConfig, load
from pipeline.models.audio import AudioPreprocess
from pipeline.models.fingerprint import fingerprint, module_fingerprints
from pipeline.models.texts import TextPreprocess
from pipeline.project.recipe import IRRELEVANT, recipe_of
from pipeline.split import Prefix
from pipeline.split.blocks import find_blocks, resolve
from pipeline.split.forward import trace
from pipeline.split.observation import Observation, observe
from pipeline.split.plan import initial_plan
from pipeline.tasks import Head

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 1, 1], [9, 8, 7, 6, 5, 12, 11, 10, 9, 13]])
MASK = (IDS != 1).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()}
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = SMALL | {"vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 1}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "bert": (WORDS, TEXT),
    "roberta": (WORDS, TEXT),
    "distilbert": ({"vocab_size": 32, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 16}, TEXT),
    "deberta-v2": (WORDS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, TEXT),
    "mistral": (WORDS | {"num_key_value_heads": 2, "sliding_window": 4, "use_cache": False}, TEXT),
    "llama": (WORDS | {"num_key_value_heads": 2, "use_cache": False}, TEXT),
    "qwen2": (WORDS | {"num_key_value_heads": 2, "use_cache": False}, TEXT),
    "gpt2": (
        {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64, "use_cache": False},
        TEXT,
    ),
    "gemma2": (WORDS | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "use_cache": False}, TEXT),
    "modernbert": (WORDS | {"global_attn_every_n_layers": 2, "local_attention": 4}, TEXT),
    "vit": (SMALL | {"image_size": 32, "patch_size": 8}, PIXELS),
    "dinov2": (SMALL | {"image_size": 32, "patch_size": 8}, PIXELS),
    "convnext": ({"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 2, 1]}, PIXELS),
}


def others(value: object) -> list[object]:
    """Other values that a setting may take."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value * 2, value + 1, max(1, value - 1)]
        case float():
            return [value * 1.5 + 0.1, 1e-2]
        case str():
            return {"gelu": ["relu"], "silu": ["relu"], "gelu_new": ["relu"]}.get(value, [f"{value}x"])
        case None:
            return [True, 2, 0.5]
        case list():
            return [value[:-1], value[::-1]] if value else [[1]]
    return []


def variants(settings: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Each setting with each other value; of nested ones those inside."""
    for name, value in settings.items():
        if isinstance(value, dict):
            for inner, other in variants(value):
                yield name, value | {inner: other}
        else:
            for other in others(value):
                yield name, other


def build(config: PreTrainedConfig) -> nn.Module:
    """A network whose weights are the same functions of their names and shapes, whatever the configuration."""
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, item in model.named_parameters():
            size = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            item.copy_(size + 0.4 * torch.sin(torch.arange(item.numel()).view(item.shape) * 1.7 + len(name)))
    return model


def recipe_and_state(model: nn.Module, example: dict[str, Tensor]) -> tuple[str, dict[Any, Tensor]]:
    """What the recipe says of the network before the cut 0.5, and what crosses it; a split without its proof."""
    modules = module_fingerprints(model, IRRELEVANT)
    seen = trace(model, (), example)
    cut = resolve(model, 0.5, seen.calls, find_blocks(model, seen.calls))
    prefix = Prefix(model, initial_plan(model, cut, seen), [])
    made = recipe_of(prefix, {}, storage="raw:float16", compute_dtype="float32", modules=modules)
    observation = Observation(cut, ())
    observe(model, [observation], (), example)
    return made.digest, observation.values


def differ(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        one[name].shape != other[name].shape or not torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
        for name in one
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_field_of_a_configuration(family: str, record_property: Callable[[str, object], None]) -> None:
    small, example = FAMILIES[family]
    config = AutoConfig.for_model(family, **small)
    recipe, state = recipe_and_state(build(config), example)
    again, _ = recipe_and_state(build(AutoConfig.for_model(family, **small)), example)
    assert again == recipe, "the same configuration makes the same recipe"
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    tried, moved = set[str](), set[str]()
    for name, value in variants(settings):
        if name in moved:
            continue
        try:
            other = AutoConfig.for_model(family, **settings | {name: value})
            found, changed = recipe_and_state(build(other), example)
        except Exception:  # such a network does not exist, or the split refuses it: no state is made
            continue
        tried.add(name)
        if differ(state, changed):
            moved.add(name)
            assert found != recipe, f"{name} = {value!r} moves the state of {family}, and the recipe stays"
    assert len(moved) >= 2
    record_property("fields", f"{family}: {len(tried)} tried, {len(moved)} move the state")


def slow_tokenizer(folder: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##b", "##e", ",", "é", "e"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n", encoding="utf-8")
    return ProphetNetTokenizer(str(folder / "vocab.txt"))


def byte_tokenizer(folder: Path) -> Any:
    return ByT5Tokenizer(extra_ids=4)


def fast_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "bert")


SETTINGS_OF_TOKENIZERS: dict[str, list[object]] = {
    "do_lower_case": [True, False],
    "do_basic_tokenize": [True, False],
    "tokenize_chinese_chars": [True, False],
    "strip_accents": [True, False],
    "never_split": [["a"]],
    "split_special_tokens": [True, False],
    "add_prefix_space": [True, False],
    "padding_side": ["left"],
    "truncation_side": ["left"],
    "model_input_names": [["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]],
    "cls_token": ["[MASK]", "a"],
    "sep_token": ["[MASK]", "b"],
    "unk_token": ["[MASK]", "c"],
    "bos_token": ["d"],
    "additional_special_tokens": [["a b"]],
    "add_bos_token": [True],
    "add_eos_token": [True],
    "clean_up_tokenization_spaces": [True, False],
}
TEXTS = ("A b É e\u0301 中", "[CLS] a, b [MASK] [SEP] d", " ".join("abcde" * 20), "ab ABE a b")


def ids(made: TextPreprocess) -> list[list[list[int]]]:
    return [[made(text)[name].tolist() for name in made.inputs] for text in TEXTS]


@pytest.mark.parametrize("make", [slow_tokenizer, byte_tokenizer, fast_tokenizer])
def test_every_setting_of_a_tokenizer(make: Callable[[Path], Any], text_folder: Path, record_property: Any) -> None:
    folder = text_folder.parent / "tokenizer"
    make(text_folder.parent).save_pretrained(folder)
    saved = folder / "tokenizer_config.json"
    settings = json.loads(saved.read_text())

    def load(**changes: object) -> TextPreprocess:
        saved.write_text(json.dumps(settings | changes))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        names = (name for name in tokenizer.model_input_names if name in ("input_ids", "token_type_ids"))
        return TextPreprocess(tokenizer, 12, tuple(names))

    before = load()
    wanted, recipe, tried, moved = ids(before), fingerprint(dict(before.recipe())), 0, set()
    before.tokenizer("a b", max_length=3, truncation=True, padding="max_length")
    assert fingerprint(dict(load().recipe())) == recipe == fingerprint(dict(before.recipe())), "use changes nothing"
    for name in {*settings, *SETTINGS_OF_TOKENIZERS} - {"tokenizer_class"}:
        for value in SETTINGS_OF_TOKENIZERS.get(name) or others(settings.get(name)):
            try:
                changed = load(**{name: value})
                found = ids(changed)
            except Exception:  # there is no such tokenizer
                continue
            tried += 1
            if found != wanted:
                moved.add(name)
                assert fingerprint(dict(changed.recipe())) != recipe, f"{name} = {value!r} changes ids unseen"
    assert moved
    record_property("settings", f"{make.__name__}: {tried} tried, {len(moved)} change ids: {sorted(moved)}")


@pytest.mark.parametrize("kind", [Wav2Vec2FeatureExtractor, WhisperFeatureExtractor, SeamlessM4TFeatureExtractor])
@pytest.mark.filterwarnings("ignore")
def test_every_setting_of_an_audio_processor(kind: Any, record_property: Any) -> None:
    pytest.importorskip("soundfile", reason="sounds are decoded by the extra `audio`")
    small = {"feature_size": 1} if kind is Wav2Vec2FeatureExtractor else {}
    settings = {k: v for k, v in kind(**small).to_dict().items() if not k.endswith(("_type", "version"))} | small
    wave = np.sin(np.arange(16000) / 7).astype(np.float32)

    def made(**changes: object) -> tuple[str, dict[str, Tensor]]:
        extractor = kind(**settings | changes)
        names = tuple(name for name in extractor.model_input_names if name != "attention_mask")
        preprocess = AudioPreprocess(16000, None, names, extractor)
        return fingerprint(dict(preprocess.recipe())), preprocess(wave)

    tried, moved = changes_seen(made, settings)
    assert moved
    record_property("settings", f"{kind.__name__}: {tried} tried, {len(moved)} change inputs: {sorted(moved)}")


def changes_seen(made: Callable[..., tuple[str, dict[str, Tensor]]], settings: dict[str, Any]) -> tuple[int, set[str]]:
    """Vary `settings` one by one: what changes the inputs changes the recipe. Return how many were tried, and which do.

    `made` returns recipe and inputs under some changed settings.
    """
    (recipe, state), tried, moved = made(), 0, set()
    assert made()[0] == recipe
    for name, value in variants(settings):
        try:
            found, changed = made(**{name: value})
        except Exception:  # the library refuses this value
            continue
        tried += 1
        if differ(state, changed):
            moved.add(name)
            assert found != recipe, f"{name} = {value!r} changes the inputs unseen"
    return tried, moved


OWN = """
import functools
import numpy as np
import torch
from torch import nn
SCALE = {scale}
def helper(x):
    return x * {factor} + SCALE
class Config:
    def __init__(self):
        self.window = {window}
class Base(nn.Module):
    def finish(self, x):
        return {finish}
class Block(Base):
    depth = {depth}
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scales, self.act, self._private = {scales}, {act}, {private}
        self.table, self.config = {table}, Config()
        self.apart = [nn.Linear(4, 4)]
        with torch.no_grad():
            self.apart[0].weight.fill_({apart})
    @property
    def shift(self):
        return {shift}
    def forward(self, x):
        x = self.act(self.linear(x)) * self.scales[0] + self._private.get("shift", 0.0)
        x = self.apart[0](x) if self.config.window else x
        return self.finish(helper(x)) + self.table.sum() + self.shift + self.depth
class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(4, classes)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""
PLAIN = {
    "scale": ["1.0", "2.0"],
    "factor": ["1.0", "3.0"],
    "window": ["None", "5"],
    "finish": ["x", "x.clamp(min=0.1)"],
    "depth": ["0", "1"],
    "scales": ["[1.0, 2.0]", "[9.0, 2.0]"],
    "act": ["torch.tanh", "torch.relu", "(lambda x: x + 1)", "functools.partial(torch.clamp, max=0.1)"],
    "private": ["{}", "{'shift': 1.0}"],
    "table": ["torch.zeros(2)", "torch.ones(2)", "np.ones(2)"],
    "apart": ["1.0", "2.0"],
    "shift": ["0.0", "0.5"],
}


def own_network(folder: Path, number: int, **changes: str) -> Any:
    """A module of the user's own, from a file, as `load_function` imports one."""
    values = {name: plain[0] for name, plain in PLAIN.items()} | changes
    text = OWN
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    file = folder / f"own{number}.py"
    file.write_text(text)
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    exec(compile(text, file, "exec"), vars(module))
    for item in vars(module).values():
        if getattr(item, "__module__", None) == "builtins" and isinstance(item, type):
            item.__module__ = file.stem
    return module.Net()


def test_attributes_of_any_type_and_code_of_ones_own(tmp_path: Path) -> None:
    x = {"x": torch.linspace(-1, 1, 8).view(2, 4)}
    plain = own_network(tmp_path, 0, window="5")
    recipe, state = recipe_and_state(plain, x)
    assert recipe_and_state(own_network(tmp_path, 1, window="5"), x)[0] == recipe
    number = 1
    for name, values in PLAIN.items():
        for value in values[1:] if name != "window" else values[:1]:
            number += 1
            found, changed = recipe_and_state(own_network(tmp_path, number, **{"window": "5", name: value}), x)
            assert differ(state, changed), name
            assert found != recipe, f"{name} = {value} moves the state unseen"


def test_comments_layout_and_the_head_change_nothing(tmp_path: Path) -> None:
    x = {"x": torch.linspace(-1, 1, 8).view(2, 4)}
    recipe, _ = recipe_and_state(own_network(tmp_path, 0), x)
    spaced = OWN.replace("    return x *", "    # why\n\n    return x *")
    assert recipe_and_state(own_network(tmp_path, 1), x)[0] == recipe
    assert spaced != OWN
    for key in ("id2label", "num_labels", "_name_or_path"):
        config = AutoConfig.for_model("bert", **WORDS)
        before = recipe_and_state(build(config), TEXT)[0]
        setattr(config, key, {"id2label": {0: "x", 1: "y"}, "num_labels": 7}.get(key, "elsewhere"))
        assert recipe_and_state(build(config), TEXT)[0] == before


def test_a_forward_put_in_place_of_another_and_hooks(tmp_path: Path) -> None:
    config, found = AutoConfig.for_model("bert", **WORDS), set[str]()
    model = build(config)
    found.add(recipe_and_state(model, TEXT)[0])
    hooked = build(config)
    hooked.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 2)
    found.add(recipe_and_state(hooked, TEXT)[0])
    patched = build(config)
    layer = patched.encoder.layer[0].output
    layer.forward = types.MethodType(lambda self, hidden, residual: residual, layer)
    found.add(recipe_and_state(patched, TEXT)[0])
    assert len(found) == 3


def test_what_cannot_be_saved_is_described_too() -> None:
    import threading  # noqa: PLC0415

    class Held:
        def __init__(self, value: float) -> None:
            self.value, self.lock = value, threading.Lock()
            self.me = self

    assert fingerprint(Held(1.0)) == fingerprint(Held(1.0)) != fingerprint(Held(2.0))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 1.0, True, "1", b"1", None]) != fingerprint([1.0, 1, True, "1", b"1", None])
    assert fingerprint(torch.device("cpu")) == fingerprint(torch.device("cuda:1"))


@pytest.mark.parametrize("kind", [ViTImageProcessor, CLIPImageProcessor, ConvNextImageProcessor])
@pytest.mark.filterwarnings("ignore")
def test_every_setting_of_an_image_processor(kind: Any, tmp_path: Path, record_property: Any) -> None:
    small, _ = FAMILIES["vit"]
    ViTForImageClassification(AutoConfig.for_model("vit", **small)).save_pretrained(tmp_path)
    kind(size={"shortest_edge": 40} if kind is not ViTImageProcessor else {"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    saved = tmp_path / "preprocessor_config.json"
    settings = json.loads(saved.read_text())
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)

    def made(**changes: object) -> tuple[str, dict[str, Tensor]]:
        saved.write_text(json.dumps(settings | changes))
        backbone = load(ModelConfig(backbone=f"hf:{tmp_path}"), PreprocessConfig(), Head("classes", 3))
        return fingerprint(dict(backbone.preprocess.recipe())), backbone.preprocess(image)

    tried, moved = changes_seen(made, {n: value for n, value in settings.items() if n != "image_processor_type"})
    assert len(moved) >= 3
    record_property("settings", f"{kind.__name__}: {tried} tried, {len(moved)} change inputs: {sorted(moved)}")
