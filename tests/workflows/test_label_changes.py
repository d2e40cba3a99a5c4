"""Whatever the source: another label encodes nothing, and the sample table has it."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import tiny
import yaml
from torch import Tensor, nn

from pipeline.data import DataConfig, Row, SampleTable, Source
from pipeline.encode.encoder import Encoder
from pipeline.project import Project
from pipeline.tasks import Head
from pipeline.workflows.encode import encode_project

Settings = dict[str, Any]
LABELS = ["a", "b"] * 6
OTHERS = ["b", "a", "a", "b"] * 3
"""Labels as they are, and as they are set right; half of them change."""
BASIC: Settings = {"data": {"validation": 0.0}, "model": {"backbone": "tiny:conv_net"}}
TEXTS = [" ".join([word] * count) for word in ("one", "two", "three") for count in range(1, 5)]
IMAGES = {"preprocess": {"kind": "image", "image_size": 16}}
ARRAYS = {"preprocess": {"kind": "array"}}
WORDS = {"model": {"backbone": "hf:bert"}}


class Noise(nn.Module):
    """A network that hears."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv1d(1, 4, 9, 4), nn.ReLU(), nn.Conv1d(4, 4, 9, 4), nn.ReLU())
        self.classifier = nn.Linear(4, classes)

    def forward(self, wave: Tensor) -> Tensor:
        return self.classifier(self.blocks(wave[:, None]).mean(-1))


def noise(head: Head) -> nn.Module:
    return Noise(head.size or 0)


SOUNDS = {
    "model": {"backbone": f"{__name__}:noise"},
    "preprocess": {"kind": "audio", "rate": 8000, "seconds": 0.1},
}


def wave(number: int, path: Path) -> None:
    soundfile.write(path, np.random.default_rng(number).uniform(-1, 1, 900).astype(np.float32), 8000)


def in_folders(suffix: str, write: Callable[[int, Path], Any]) -> Callable[[Sequence[str]], Settings]:
    def make(labels: Sequence[str]) -> Settings:
        for number, label in enumerate(labels):
            for old in Path("set").glob(f"*/{number}.{suffix}"):
                old.unlink()
            Path("set", label).mkdir(parents=True, exist_ok=True)
            write(number, Path("set", label, f"{number}.{suffix}"))
        return {"path": "set"}

    return make


def png(number: int, path: Path) -> None:
    path.write_bytes(tiny.draw(number % 3, number))


def image_table(labels: Sequence[str]) -> Settings:
    for number in range(len(labels)):
        png(number, Path(f"{number}.png"))
    lines = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    Path("all.csv").write_text("\n".join(["file,kind", *lines]))
    return {"path": "all.csv", "image": "file", "label": "kind"}


def audio_table(labels: Sequence[str]) -> Settings:
    for number in range(len(labels)):
        wave(number, Path(f"{number}.flac"))
    lines = [json.dumps({"file": f"{number}.flac", "kind": label}) for number, label in enumerate(labels)]
    Path("all.jsonl").write_text("\n".join(lines))
    return {"path": "all.jsonl", "audio": "file", "label": "kind"}


def parquet_images(labels: Sequence[str]) -> Settings:
    images = [tiny.draw(number % 3, number) for number in range(len(labels))]
    pa.parquet.write_table(pa.table({"image": images, "label": labels}), "all.parquet")
    return {"path": "all.parquet", "image": "image", "label": "label"}


def text_table(labels: Sequence[str]) -> Settings:
    Path("all.tsv").write_text("\n".join(["text\tlabel", *(f"{t}\t{la}" for t, la in zip(TEXTS, labels, strict=True))]))
    return {"path": "all.tsv", "text": "text", "label": "label"}


def saved(labels: Sequence[str]) -> Settings:
    Path("set").mkdir(exist_ok=True)
    table = pa.table({"text": TEXTS, "label": labels})
    with pa.ipc.new_stream("set/data.arrow", table.schema) as stream:
        stream.write_table(table)
    Path("set/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return {"path": "set", "text": "text", "label": "label"}


def pixel_table(labels: Sequence[str]) -> Settings:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 64))
    lines = [",".join(map(str, [*row, label])) for row, label in zip(pixels.tolist(), labels, strict=True)]
    Path("all.csv").write_text("\n".join(lines))
    return {"path": "all.csv"}


def npy(labels: Sequence[str]) -> Settings:
    np.save("x.npy", np.random.default_rng(0).random((len(labels), 3, 8, 8), np.float32))
    np.save("x.labels.npy", np.array(labels))
    return {"path": "x.npy"}


def npz(labels: Sequence[str]) -> Settings:
    np.savez("x.npz", x=np.random.default_rng(0).random((len(labels), 3, 8, 8), np.float32), y=np.array(labels))
    return {"path": "x.npz"}


def mnist(labels: Sequence[str]) -> Settings:
    folder = Path("MNIST/raw")
    folder.mkdir(parents=True, exist_ok=True)
    count = len(labels)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8).tobytes()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        numbers = bytes("ab".index(label) for label in labels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + numbers)
    return {"path": ".", "name": "MNIST"}


class Own(Source):
    def __init__(self, config: DataConfig) -> None:
        self.labels = config.options["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, i: int) -> Row:
        return Row(f"row {i}", None, {"label": self.labels[i]})

    def content(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).random((3, 8, 8), np.float32)


def own(labels: Sequence[str]) -> Settings:
    return {"options": {"labels": list(labels)}}


@pytest.mark.parametrize(
    ("source", "make", "sections"),
    [
        ("images", in_folders("png", png), IMAGES),
        ("images", image_table, IMAGES),
        ("images", parquet_images, IMAGES),
        ("audio", in_folders("wav", wave), SOUNDS),
        ("audio", audio_table, SOUNDS),
        ("text", text_table, WORDS),
        ("text", saved, WORDS),
        ("pixels", pixel_table, IMAGES),
        ("arrays", npy, ARRAYS),
        ("arrays", npz, ARRAYS),
        ("torchvision", mnist, IMAGES),
        (f"{__name__}:Own", own, ARRAYS),
    ],
)
@pytest.mark.usefixtures("text_folder")
def test_another_label_runs_no_prefix(
    source: str,
    make: Callable[[Sequence[str]], Settings],
    sections: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[int] = []
    forward = Encoder._forward

    def counted(*args: Any) -> None:
        runs.append(1)
        forward(*args)

    monkeypatch.setattr(Encoder, "_forward", counted)
    tables = []
    for labels in (LABELS, OTHERS):
        runs.clear()
        data = BASIC["data"] | {"source": source} | make(labels)
        encode = {"cuts": [0.5], "workers": 0}
        Path("params.yaml").write_text(yaml.safe_dump(BASIC | sections | {"data": data, "encode": encode}))
        project = Project.load(Path("params.yaml"))
        assert encode_project(project)
        tables.append((len(runs), tiny.files(project.activations), SampleTable.read(project.samples)))
    (first, stored, before), (second, still_stored, after) = tables
    assert first > 0
    assert second == 0
    assert still_stored == stored
    labels_of = [dict(zip(map(bytes, t.keys), t.targets["label"].tolist(), strict=True)) for t in (before, after)]
    assert labels_of[0].keys() == labels_of[1].keys()
    changed = sum(labels_of[1][key] != label for key, label in labels_of[0].items())
    assert changed == sum(one != other for one, other in zip(LABELS, OTHERS, strict=True))
