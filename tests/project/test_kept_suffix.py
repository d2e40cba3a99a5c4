"""What a store keeps of the network after its cut, and when that is not used."""

import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from suffix_runs import age, counted, hide, project
from suffix_runs import images as image_folder
from torchvision.models import squeezenet1_1

from pipeline.errors import AbsentError, CorruptStoreError, StaleStoreError
from pipeline.project.pretrained_suffix import PretrainedSuffix
from pipeline.runs.finished import open_run
from pipeline.store import Store, verify
from pipeline.tasks import Head
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

images = image_folder


def test_only_what_changed_is_written_again(images: Path) -> None:
    encode_project(project())
    written = {path: path.stat().st_mtime_ns for path in Path("data/activations").rglob("*") if path.is_file()}
    encode_project(project(), rehash=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    state = load_file("net.safetensors")
    save_file(state | {"classifier.bias": state["classifier.bias"] + 1}, "net.safetensors")
    encode_project(project())
    kept = load_file("data/activations/1.0/suffix/model.safetensors")
    assert torch.equal(kept["classifier.bias"], state["classifier.bias"] + 1)


def test_what_was_lost_is_carried_again(images: Path) -> None:
    made = project()
    encode_project(made)
    before = tiny.files(Path("data/activations"))
    for file in Path("data/activations/0.5/suffix").iterdir():
        if file.is_file():
            file.unlink()
    encode_project(made)
    assert tiny.files(Path("data/activations")) == before


def test_it_may_be_left_out(images: Path) -> None:
    encode_project(project())
    made = project(encode={"suffix": False})
    encode_project(made)
    assert not list(Path("data/activations").rglob("suffix"))
    hide(images / "net.safetensors")
    with pytest.raises(AbsentError, match=r"net.safetensors'; nothing is there .*carries no weights.*encode\.suffix"):
        train_project(made, "0.5")


def test_weights_of_other_settings_do_not_stand_in(images: Path) -> None:
    encode_project(project())
    hide(images / "net.safetensors")
    with pytest.raises(AbsentError, match=r"model\.weights = 'net.safetensors', today's is 'other.safetensors'"):
        train_project(project(model={"weights": "other.safetensors"}), "0.5")
    with pytest.raises(StaleStoreError, match=r"preprocessing.image_size"):
        train_project(project(preprocess={"kind": "image", "image_size": 12}), "0.5")
    with pytest.raises(AbsentError, match=r"head\.size = 3, today's is 4"):
        PretrainedSuffix.of(Store.open(Path("data/activations/0.5")), project().model, Head("classes", 4))


def test_damage_is_told(images: Path) -> None:
    encode_project(project())
    file = Path("data/activations/0.5/suffix/model.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert [fault for fault in verify(Store.open(Path("data/activations/0.5"))) if "not what was written" in fault]
    hide(images / "net.safetensors")
    with pytest.raises(CorruptStoreError, match=r"model\.safetensors is not what was written"):
        train_project(project(), "0.5")
    about = Path("data/activations/1.0/suffix/suffix.json")
    said = json.loads(about.read_text())
    about.write_text(json.dumps(said | {"about": said["about"] | {"recipe": "0" * 32}}))
    with pytest.raises(CorruptStoreError, match="belongs to another store"):
        train_project(project(), "1.0")


def test_the_whole_model_takes_all_weights(images: Path) -> None:
    encode_project(project())
    hide(images / "net.safetensors")
    train_project(project(), "0.5")
    with pytest.raises(
        AbsentError, match=r"run 0\.5: model\.weights is 'net.safetensors'; nothing is there.*before the cut"
    ):
        export_run(project(), "0.5", Path("exported"))
    with pytest.raises(AbsentError, match="before the cut"):
        open_run(project(), "0.5")


def test_encoding_takes_all_weights(images: Path) -> None:
    encode_project(project())
    (images / "photos/square/new.png").write_bytes(tiny.draw(1, 99))
    hide(images / "net.safetensors")
    with pytest.raises(AbsentError, match="nothing is there"):
        encode_project(project())


def test_nothing_is_carried_that_cannot_be_missed(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        encode_project(project(model={"weights": "pretrained"}))
    assert not list(Path("data/activations").rglob("suffix"))
    assert "carries" not in caplog.text


def test_weights_that_changed_are_read(images: Path) -> None:
    age(images / "net.safetensors")
    encode_project(project())
    state = load_file("net.safetensors")
    name = "blocks.0.0.weight"
    save_file(state | {name: state[name] + 1}, "net.safetensors")
    with pytest.raises(StaleStoreError, match="weights"):
        train_project(project(), "0.5")


def test_another_network_is_not_filled_in(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    age(images / "net.safetensors")
    encode_project(project())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.ConvNet, "forward", lambda self, x: self.classifier(self.blocks(x).mean((2, 3))) * 1)
        with caplog.at_level(logging.INFO), pytest.raises(StaleStoreError, match="architecture"):
            train_project(project(), "0.5")
    assert "are of another network: module '' has other attributes" in caplog.text


def test_a_split_by_another_version_of_the_library_is_proved_again(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(squeezenet1_1(num_classes=3).state_dict(), "squeeze.pth")
    age(images / "squeeze.pth")
    made = project(
        model={"backbone": "torchvision:squeezenet1_1", "weights": "squeeze.pth"},
        preprocess={"kind": None, "image_size": 32},
        encode={"cuts": [0.5]},
        train={"epochs": 1},
    )
    encode_project(made)
    with counted() as built, pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        train_project(made, "0.5", name="same")
        assert not built
        patch.setattr("pipeline.project.pretrained_suffix.version", lambda name: "99")
        train_project(made, "0.5", name="other")
        assert len(built) == 1
    assert ", here is 99, whose code may differ" in caplog.text
