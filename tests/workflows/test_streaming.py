"""Weights that stay in their files while samples are encoded: the same stores as with all of them in memory."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from pipeline.errors import ConfigError
from pipeline.project import Project
from pipeline.split.sections import Sections
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

WORDS = ("one", "two", "three", "good", "bad")
SMALL: dict[str, Any] = {"vocab_size": len(tiny.TOKENS), "pad_token_id": 0, "num_labels": 3}
DECODER = SMALL | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}


def texts(folder: Path) -> dict[str, dict[str, object]]:
    draw = np.random.default_rng(0)
    lines = sorted({" ".join(draw.choice(WORDS, draw.integers(1, 12))) for _ in range(60)})[:40]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": str("good" in t)}) + "\n" for t in lines)
    )
    return {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
        "preprocess": {"kind": "text", "image_size": None},
    }


def images(folder: Path) -> dict[str, dict[str, object]]:
    tiny.write_images(folder / "photos", range(12))
    return {"preprocess": {"kind": "image", "image_size": 32}}


class StreamingContract:
    """A network in safetensors files, random, with a head of its own."""

    data: Callable[[Path], dict[str, dict[str, object]]] = staticmethod(texts)
    shard = "1GB"
    dtype = torch.float32
    settings: Mapping[str, dict[str, object]] = {}

    def network(self) -> transformers.PreTrainedModel:
        raise NotImplementedError

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        tiny.write_text_network(tmp_path / "net")
        (tmp_path / "net/model.safetensors").unlink()
        torch.manual_seed(0)
        self.network().to(self.dtype).save_pretrained(tmp_path / "net", max_shard_size=self.shard)
        return tmp_path

    def project(self, folder: Path, placement: str, **encode: object) -> Project:
        given = self.data(folder) | {"model": {"backbone": f"hf:{folder / 'net'}"}}
        given["encode"] = {"cuts": [0.25, 0.75, 1.0], "placement": placement, **encode}
        names = given.keys() | self.settings.keys()
        changes = {name: given.get(name, {}) | self.settings.get(name, {}) for name in names}
        return Project.load(tiny.write_params(folder, **changes))

    def test_stores_are_those_of_weights_in_memory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert encode_project(self.project(folder, "memory"))
        expected = stores()
        shutil.rmtree("data/activations")
        groups: list[int] = []
        run = Sections.run
        monkeypatch.setattr(
            Sections, "run", lambda self, calls, *more: groups.append(len(calls)) or run(self, calls, *more)
        )
        assert encode_project(self.project(folder, "stream"))
        assert max(groups) > 2
        found = stores()
        assert found.keys() == expected.keys()
        assert [name for name in expected if expected[name] != found[name]] == []

    def test_the_top_trains_from_them(self, folder: Path) -> None:
        project = self.project(folder, "stream", cuts=[0.75])
        assert encode_project(project)
        shutil.move("net", "hidden")
        train_project(project, "0.75")


def stores() -> dict[str, bytes]:
    return tiny.files(Path("data/activations"))


class TestLlama(StreamingContract):
    shard = "10KB"

    def network(self) -> transformers.PreTrainedModel:
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER, num_key_value_heads=1))


class TestBfloat16(TestLlama):
    dtype = torch.bfloat16


class TestConverted(TestLlama):
    """The weights are converted as their block is entered."""

    settings: Mapping[str, dict[str, object]] = {"model": {"dtype": "bfloat16"}}


class TestBert(StreamingContract):
    def network(self) -> transformers.PreTrainedModel:
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(**DECODER, max_position_embeddings=16)
        )


class TestGPT2(StreamingContract):
    """Linear layers with transposed weights, and no padding token of its own."""

    def network(self) -> transformers.PreTrainedModel:
        config = transformers.GPT2Config(**SMALL, n_embd=16, n_layer=5, n_head=2, n_positions=16)
        return transformers.GPT2ForSequenceClassification(config)


class TestEncoderDecoder(StreamingContract):
    """Embeddings that are tied; the output of the encoder goes to every later block."""

    def network(self) -> transformers.PreTrainedModel:
        sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in self.sizes.items()}
        config = transformers.BartConfig(
            **SMALL, d_model=16, max_position_embeddings=32, eos_token_id=3, bos_token_id=2, **sizes
        )
        return transformers.BartForSequenceClassification(config)

    sizes: Mapping[str, int] = {"layers": 3, "attention_heads": 2, "ffn_dim": 32}


class TestTiedEmbeddings(StreamingContract):
    """A language model's own embeddings, pooled; its head is not used."""

    settings: Mapping[str, dict[str, object]] = {
        "data": {
            "source": "pairs",
            "path": "texts.jsonl",
            "anchor": "text",
            "positive": "text",
            "text": None,
            "label": None,
        },
        "task": {"kind": "similarity"},
    }

    def network(self) -> transformers.PreTrainedModel:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**DECODER, num_key_value_heads=1, tie_word_embeddings=True)
        )


class TestViT(StreamingContract):
    data = staticmethod(images)

    def network(self) -> transformers.PreTrainedModel:
        sizes = {name: size for name, size in DECODER.items() if name not in ("vocab_size", "pad_token_id")}
        return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


class TestResNet(StreamingContract):
    """Batch norms have buffers; stages have skip connections."""

    data = staticmethod(images)

    def network(self) -> transformers.PreTrainedModel:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], num_labels=3
        )
        return transformers.ResNetForImageClassification(config)


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_text_network(tmp_path / "net")
    TestLlama().network().save_pretrained(tmp_path / "net")
    return tmp_path


def encode(folder: Path, placement: str, **changes: dict[str, object]) -> bool:
    case = TestLlama()
    case.settings = changes
    return encode_project(case.project(folder, placement, cuts=[0.5]))


def in_bin(folder: Path) -> None:
    torch.save(load_file(folder / "net/model.safetensors"), folder / "net/pytorch_model.bin")
    (folder / "net/model.safetensors").unlink()


def in_another_type(folder: Path) -> None:
    settings = json.loads((folder / "net/config.json").read_text())
    (folder / "net/config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))


def of_experts(folder: Path) -> None:
    config = transformers.MixtralConfig(**DECODER, num_key_value_heads=1, num_local_experts=2)
    transformers.MixtralForSequenceClassification(config).save_pretrained(folder / "net")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_bin, r"in no \.safetensors files; save them so"),
        (in_another_type, r"float32 in their files, .* says bfloat16; set model\.options to \{dtype: float32\}"),
        (of_experts, r"arranged anew when they are loaded .*save_original_format=False"),
    ],
)
def test_other_files_are_refused_or_loaded(
    llama: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], reason: str
) -> None:
    change(llama)
    with pytest.raises(ConfigError, match=f"encode.placement is stream, but .*{reason}.*; or set it to memory"):
        encode(llama, "stream")
    monkeypatch.setattr("pipeline.project.placement.free_bytes", int)
    assert encode(llama, "auto")


def test_the_remedies_help(llama: Path) -> None:
    in_another_type(llama)
    assert encode(llama, "stream", model={"options": {"dtype": "float32"}, "dtype": "bfloat16"})
    shutil.rmtree("data")
    config = transformers.MixtralConfig(**DECODER, num_key_value_heads=1, num_local_experts=2)
    network = transformers.MixtralForSequenceClassification(config)
    network.save_pretrained(llama / "net", save_original_format=False)
    assert encode(llama, "stream")


@pytest.mark.parametrize(("free", "streamed"), [(10**12, False), (0, True)])
def test_auto_streams_what_does_not_fit(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, streamed: bool
) -> None:
    monkeypatch.setattr("pipeline.project.placement.free_bytes", lambda: free)
    with caplog.at_level("INFO"):
        assert encode(llama, "auto")
    assert ("streamed" in caplog.text) is streamed


def test_networks_of_other_libraries_are_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny:conv_net is loaded into memory; only weights of hf: networks"):
        encode(llama, "stream", model={"backbone": "tiny:conv_net"})
    with pytest.raises(ConfigError, match=r"encode\.compile is true"):
        encode_project(TestLlama().project(llama, "stream", compile=True))


DIES = """
import os
from pathlib import Path
from pipeline.encode.encoder import Encoder
from pipeline.project import Project
from pipeline.workflows.encode import encode_project

write, written = Encoder._write, []

def dying(self, *args):
    if len(written) == 1:
        os._exit(9)
    written.append(1)
    return write(self, *args)

Encoder._write = dying
encode_project(Project.load(Path("params.yaml")))
"""


def test_a_killed_encode_goes_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TestLlama()
    made = case.project(llama, "stream", cuts=[0.5], segment_samples=16)
    process = tiny.python(llama, "-c", DIES)
    said, _ = process.communicate()
    assert process.returncode == 9, said
    sizes = tiny.count_forwards(monkeypatch)
    assert encode_project(made)
    assert sum(sizes) == 40 - 16
    found = stores()
    shutil.rmtree("data/activations")
    assert encode_project(case.project(llama, "memory", cuts=[0.5], segment_samples=16))
    assert found == stores()


def test_other_processes_stream_too(llama: Path) -> None:
    case = TestLlama()
    executor = {"kind": "local", "processes": 2}
    assert encode_project(case.project(llama, "stream", cuts=[0.5], segment_samples=16, executor=executor))
    found = stores()
    shutil.rmtree("data/activations")
    assert encode_project(case.project(llama, "memory", cuts=[0.5], segment_samples=16))
    assert found == stores()
