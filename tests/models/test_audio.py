"""Sounds, from files to a trained suffix: decoded, resampled, cut or filled up, with an extractor or without."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from pipeline.errors import BadSampleError, ConfigError
from pipeline.models import ModelConfig, PreprocessConfig, load
from pipeline.models.audio import AudioPreprocess
from pipeline.project import Project
from pipeline.project.model_example import draw_inputs
from pipeline.store import Store
from pipeline.tasks import Head
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

RATE = 8000


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32) / 2


def write(wave: np.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind)
    return file.getvalue()


def heard(content: object, seconds: float | None = None) -> np.ndarray:
    return AudioPreprocess(RATE, seconds, ("x",))(content)["x"].numpy()


@pytest.mark.parametrize(("kind", "error"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_formats(kind: str, error: float) -> None:
    wave = tone(440, 0.5)
    found = heard(write(wave, kind=kind))[: len(wave)]
    assert found.dtype == np.float32
    assert np.abs(found[800:-800] - wave[800:-800]).max() < error


def test_channels_are_mixed_and_the_rate_is_the_networks() -> None:
    stereo = np.stack([tone(440, 0.5, 44100), np.zeros(22050, np.float32)], axis=1)
    found = heard(write(stereo, 44100))
    assert len(found) == 4000
    assert np.abs(found[200:-200] - tone(440, 0.5)[200:-200] / 2).max() < 1e-3


def test_a_length_cuts_and_fills_up() -> None:
    wave = tone(440, 0.5)
    assert np.array_equal(heard(write(wave), 0.25), heard(write(wave))[:2000])
    longer = heard(write(wave), 1.0)
    assert (len(longer), longer[4000:].any()) == (8000, False)
    assert np.array_equal(heard(wave, 1.0)[:4000], wave)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the audio file is empty"),
        (b"no sound at all", "cannot be decoded"),
        (write(tone(440, 0.5))[:30], "cannot be decoded"),
        (write(tone(440, 0.01)), r"has 10\.0 ms, less than 25 ms"),
        (write(np.zeros(0, np.float32)), r"has 0\.0 ms"),
        (np.full(900, np.nan, np.float32), "NaN or infinite"),
        (np.zeros((900, 2), np.float32), r"content is float32 \(900, 2\); a sound is bytes, or a waveform"),
        ("text", "content is str"),
    ],
)
def test_bad_sounds(content: object, message: str) -> None:
    with pytest.raises(BadSampleError, match=message):
        heard(content)


def test_a_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.audio.MAX_VALUES", 5000)
    content = write(tone(440, 1))
    with pytest.raises(
        BadSampleError, match=r"too long: 8000 samples of 1 channels, at most 5000 .* preprocess\.seconds"
    ):
        heard(content)
    assert len(heard(content, 0.5)) == 4000


@pytest.fixture
def wav2vec(tmp_path: Path) -> Path:
    """A Hugging Face directory of a tiny random Wav2Vec2 that takes a mask."""
    folder = tmp_path / "wav2vec"
    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        classifier_proj_size=8,
        apply_spec_augment=False,
    )
    torch.manual_seed(0)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    return folder


def opened(folder: Path, head: Head | None = None, **preprocess: Any) -> Any:
    return load(ModelConfig(backbone=f"hf:{folder}"), PreprocessConfig(**preprocess), head or Head("classes", 3))


def test_a_backbone_of_hugging_face(wav2vec: Path, tmp_path: Path) -> None:
    backbone = opened(wav2vec)
    sample = backbone.preprocess(write(tone(440, 0.5)))
    assert {name: (tuple(one.shape), one.dtype) for name, one in sample.items()} == {
        "input_values": ((4000,), torch.float32),
        "attention_mask": ((4000,), torch.int64),
    }
    assert abs(float(sample["input_values"].mean())) < 1e-3
    assert abs(float(sample["input_values"].std()) - 1) < 1e-2
    assert backbone.model(**{name: one[None] for name, one in sample.items()}).logits.shape == (1, 3)
    (tmp_path / "out").mkdir()
    backbone.save(tmp_path / "out")
    again = opened(tmp_path / "out")
    assert again.preprocess.recipe() == backbone.preprocess.recipe()
    assert opened(wav2vec, seconds=1.0).preprocess.recipe() != backbone.preprocess.recipe()
    assert set(opened(wav2vec, seconds=1.0).preprocess(tone(440, 0.5))) == {"input_values"}
    assert draw_inputs(backbone.preprocess, 2, 128)["input_values"].shape == (2, RATE)


def test_an_embedding_of_sounds(wav2vec: Path) -> None:
    backbone = opened(wav2vec, Head("embedding", pooling="mean"), seconds=0.5)
    sample = backbone.preprocess(tone(440, 0.5))
    assert backbone.model(**{name: one[None] for name, one in sample.items()}).shape == (1, 8)


@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")  # transformers' defaults for AST
def test_a_spectrogram(tmp_path: Path) -> None:
    config = ASTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_length=64, num_mel_bins=32
    )
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(tmp_path)
    backbone = opened(tmp_path, kind="audio")
    assert backbone.preprocess(write(tone(440, 0.5)))["input_values"].shape == (64, 32)


def test_settings_that_do_not_fit(wav2vec: Path, text_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocess\.rate is 16000; the backbone takes 8000 samples per second"):
        opened(wav2vec, rate=16000)
    with pytest.raises(ConfigError, match=r"preprocess\.kind is 'image'; the backbone's is 'audio'"):
        opened(wav2vec, kind="image")
    (wav2vec / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="no feature extractor can be loaded"):
        opened(wav2vec)
    own = ModelConfig(backbone=f"{__name__}:convolutions")
    with pytest.raises(ConfigError, match=r"preprocess\.rate is not set"):
        load(own, PreprocessConfig(kind="audio"), Head("classes", 2))
    with pytest.raises(ConfigError, match=r"preprocess\.seconds is for audio; hf:.* takes text; remove it"):
        opened(text_folder, seconds=1.0)
    with pytest.raises(ValueError, match=r"seconds is 1\.0, but kind is 'text'; it is for audio"):
        PreprocessConfig(kind="text", seconds=1.0)


class Convolutions(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv1d(i, 8, 9, 4), nn.ReLU()) for i in (1, 8, 8)))
        self.classifier = nn.Linear(8, classes)

    def forward(self, wave: Tensor) -> Tensor:
        return self.classifier(self.blocks(wave[:, None]).mean(-1))


def convolutions(head: Head) -> nn.Module:
    return Convolutions(head.size or 0)


@pytest.mark.parametrize("name", ["own", "wav2vec", "ragged"])
def test_from_sounds_to_a_score(name: str, wav2vec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for label, hertz in {"low": 300, "high": 2500}.items():
        Path("sounds", label).mkdir(parents=True)
        for number in range(8):
            seconds = 0.2 + 0.02 * number
            Path("sounds", label, f"{number}.wav").write_bytes(write(tone(hertz + 20 * number, seconds)))
    Path("sounds/low/broken.wav").write_bytes(b"RIFF")
    preprocess: dict[str, Any] = {} if name == "ragged" else {"seconds": 0.25}
    preprocess |= {"kind": "audio", "rate": RATE} if name == "own" else {}
    settings = {
        "data": {"source": "audio", "path": "sounds"},
        "model": {"backbone": f"{__name__}:convolutions" if name == "own" else f"hf:{wav2vec}"},
        "preprocess": preprocess,
        "encode": {"cuts": [0.5], "workers": 0, "batch_size": 4, "max_bad": 1},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01},
    }
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    project = Project.load(Path("params.yaml"))
    assert encode_project(project)
    assert "broken.wav" in Path("data/quarantine.csv").read_text()
    assert len(Store.open(Path("data/activations/0.5")).keys()) == 16
    run = train_project(project, "0.5")
    assert run.history[-1]["train/loss"] < run.history[0]["train/loss"]
