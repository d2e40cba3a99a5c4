"""Sounds: encoded bytes or a waveform -> one channel at the network's rate -> features of its library."""

import inspect
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import BadSampleError, ConfigError
from pipeline.keys import JSON
from pipeline.models.backbone import Preprocess, first_input
from pipeline.models.config import PreprocessConfig
from pipeline.models.fingerprint import Irrelevant, fingerprint

MAX_VALUES = 1 << 28
"""Longer sounds are taken for decompression bombs: 1 GiB in float32, all channels together."""
SHORTEST = 0.025
"""Shortest sound in seconds: one frame of usual networks."""
MASK = "attention_mask"
IRRELEVANT: Irrelevant = {"transformers.FeatureExtractionMixin": frozenset({"name_or_path", "_processor_class"})}


class AudioPreprocess(Preprocess):
    """Decode, mix to one channel, resample, truncate or pad to a length, and extract features if there is an extractor.

    Without a length, inputs are as long as the sound, with the mask that the network takes, if any.
    """

    def __init__(self, rate: int, seconds: float | None, inputs: tuple[str, ...], extractor: Any = None) -> None:
        """Prepare sounds at `rate` per second; `extractor` is Hugging Face's, None hands on the waveform (T,)."""
        self.rate, self.seconds, self.inputs, self.extractor = rate, seconds, inputs, extractor
        self._digest = fingerprint(extractor, IRRELEVANT)

    def __call__(self, content: object) -> dict[str, Tensor]:
        wave_T = self._wave(content)
        if self.seconds is not None:
            wave_T = wave_T[: round(self.seconds * self.rate)]
            wave_T = np.pad(wave_T, (0, round(self.seconds * self.rate) - len(wave_T)))
        if self.extractor is None:
            return {self.inputs[0]: torch.from_numpy(wave_T)}
        features = self.extractor(wave_T, sampling_rate=self.rate, return_tensors="np")
        found = {name: torch.from_numpy(np.asarray(features[name][0])) for name in self.inputs if name in features}
        return {name: one.float() if one.is_floating_point() else one.long() for name, one in found.items()}

    def _wave(self, content: object) -> np.ndarray:
        if isinstance(content, bytes):
            wave = decode(content, self.rate, self.seconds)
        elif isinstance(content, np.ndarray) and content.ndim == 1 and content.dtype.kind == "f":
            wave = content.astype(np.float32)
        else:
            what = f"{content.dtype} {content.shape}" if isinstance(content, np.ndarray) else type(content).__name__
            raise BadSampleError(f"content is {what}; a sound is bytes, or a waveform (T,) of floats at {self.rate} Hz")
        if not np.isfinite(wave).all():
            raise BadSampleError("the sound holds NaN or infinite values")
        if len(wave) < SHORTEST * self.rate:
            length = f"{1000 * len(wave) / self.rate:.1f} ms"
            raise BadSampleError(f"the sound has {length}, less than {1000 * SHORTEST:g} ms")
        return wave

    def recipe(self) -> Mapping[str, JSON]:
        extractor = None if self.extractor is None else self._digest
        shape: dict[str, JSON] = {"inputs": list(self.inputs), "rate": self.rate, "seconds": self.seconds}
        return shape | {"kind": "audio", "extractor": extractor}

    def advice(self) -> str:
        length = "as long as they are" if self.seconds is None else f"of {self.seconds:g} s"
        return f"it is given sounds {length} at {self.rate} Hz: set preprocess.seconds and rate to what it takes"

    def probe_contents(self) -> Sequence[object]:
        """Return two waveforms of different lengths."""
        times = np.arange(self.rate) / self.rate
        wave = (0.5 * np.sin(2 * np.pi * 440 * times * (1 + times))).astype(np.float32)
        return wave, wave[: self.rate // 2]

    def save(self, folder: Path) -> None:
        """Write the feature extractor's settings, where there is one."""
        if self.extractor is not None:
            self.extractor.save_pretrained(folder)


def make_audio_preprocess(config: PreprocessConfig, model: nn.Module, extractor: Any = None) -> AudioPreprocess:
    """Return the preprocessing of sounds for `model`, with the feature `extractor` of Hugging Face if there is one.

    Raises ConfigError if the rate is not known, or not the extractor's, or what decodes sounds is not installed.
    """
    _codecs()
    if extractor is None:
        if config.rate is None:
            raise ConfigError("preprocess.rate is not set; the backbone states none; set its samples per second")
        return AudioPreprocess(config.rate, config.seconds, (first_input(model),))
    rate = int(extractor.sampling_rate)
    if config.rate not in (None, rate):
        raise ConfigError(f"preprocess.rate is {config.rate}; the backbone takes {rate} samples per second; remove it")
    accepted = inspect.signature(model.forward).parameters
    unused = set() if config.seconds is None else {MASK}  # sounds of one length need no mask
    inputs = tuple(name for name in extractor.model_input_names if name in accepted and name not in unused)
    return AudioPreprocess(rate, config.seconds, inputs, extractor)


def decode(content: bytes, rate: int, seconds: float | None = None) -> np.ndarray:
    """Return an encoded sound as one channel at `rate` samples per second, (T,) float32; its first `seconds` alone.

    Raises BadSampleError if it is empty, too long, or no sound.
    """
    soundfile, soxr = _codecs()
    if not content:
        raise BadSampleError("the audio file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            wanted = file.frames if seconds is None else min(file.frames, math.ceil(seconds * file.samplerate))
            if wanted * file.channels > MAX_VALUES:
                length = f"{wanted} samples of {file.channels} channels, at most {MAX_VALUES} values are decoded"
                raise BadSampleError(f"the sound is too long: {length}; set preprocess.seconds")
            wave_T = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
            return np.asarray(soxr.resample(wave_T, file.samplerate, rate), np.float32)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise BadSampleError(f"the sound cannot be decoded: {error}") from error


def _codecs() -> tuple[Any, Any]:
    try:
        import soundfile  # noqa: PLC0415  (optional)
        import soxr  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("sounds cannot be decoded; pip install layer-recycling[audio]") from error
    return soundfile, soxr
