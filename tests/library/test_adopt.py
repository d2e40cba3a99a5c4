"""Features of another program: equal bytes out as in, trained from, refused where they are not what they say."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import layer_recycling as lr
from stages.adopt import command

N = 600


def features(count: int = N, dtype: type = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "embedding": draw.normal(size=(count, 5)).astype(dtype),
        "patches": draw.integers(0, 9, (count, 2, 3)),
        "name": np.array([f"slide-{i:05}" for i in range(count)]),
        "label": draw.integers(0, 2, count),
    }


def write_npz(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[Path, list[str]]:
    np.savez(folder / "f.npz", **arrays)
    return folder / "f.npz", ["--ids", "name", "--field", "label"]


def write_h5(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[Path, list[str]]:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "f.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array.astype(h5py.string_dtype()) if array.dtype.kind == "U" else array
    return folder / "f.h5", ["--ids", "name", "--field", "label"]


def write_safetensors(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[Path, list[str]]:
    numbers = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "name"}
    save_file(numbers | {"name": torch.arange(len(arrays["name"]))}, folder / "f.safetensors")
    return folder / "f.safetensors", ["--ids", "name", "--field", "label"]


def write_folder(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[Path, list[str]]:
    (folder / "pt").mkdir()
    for i, name in enumerate(arrays["name"]):
        item = {key: torch.as_tensor(array[i]) for key, array in arrays.items() if key != "name"}
        torch.save(item, folder / "pt" / f"{name}.pt")
    return folder / "pt", ["--field", "label"]


@pytest.mark.parametrize("write", [write_npz, write_h5, write_safetensors, write_folder])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_adopted_features_come_out_byte_for_byte(write: Any, dtype: type, tmp_path: Path) -> None:
    arrays = features(dtype=dtype)
    source, options = write(tmp_path, arrays)
    for _ in range(2):  # again: nothing is added
        done = CliRunner().invoke(command, [str(source), str(tmp_path / "states"), "--about", "a network", *options])
        assert done.output == f"{N} items in {tmp_path / 'states'}\n", done.exception
    states = lr.open_states(tmp_path / "states")
    assert len(list((tmp_path / "states").glob("?" * 32))) == 2
    lr.export_states(states, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as out:
        for name in ("embedding", "patches"):
            assert out[f"state.{name}"].dtype == arrays[name].dtype
            assert out[f"state.{name}"].tobytes() == arrays[name].tobytes()
        assert out["label"].tolist() == arrays["label"].tolist()
        given = range(N) if write is write_safetensors else arrays["name"]
        assert out["id"].tolist() == list(given)
    batch = next(iter(states.loader(8)))
    assert batch["state"]["embedding"].shape == (8, 5)


def test_bags_of_unequal_size_are_adopted(tmp_path: Path) -> None:
    bags = [torch.randn(3 + i % 4, 6) for i in range(10)]
    (tmp_path / "pt").mkdir()
    for i, bag in enumerate(bags):
        torch.save(bag, tmp_path / f"pt/{i}.pt")
    store = lr.adopt(tmp_path / "pt", tmp_path / "states")
    for bag, item in zip(bags, store.dataset(), strict=False):
        assert torch.equal(item["state"]["features"], bag)
    assert store.collate(store.dataset().__getitems__([0, 3]))["state"]["features"].shape == (2, 6, 6)


def test_what_is_not_as_it_says_is_refused(tmp_path: Path) -> None:
    arrays, folder = features(4), tmp_path / "states"
    names: dict[str, Any] = {"ids": "name", "fields": ["label"]}
    with pytest.raises(lr.DataError, match="float64"):
        lr.adopt(arrays | {"embedding": np.zeros((4, 2))}, folder, **names)
    with pytest.raises(lr.DataError, match="1 ids occur twice: a"):
        lr.adopt(arrays | {"name": np.array(["a", "a", "b", "c"])}, folder, **names)
    with pytest.raises(lr.DataError, match="embedding 3"):
        lr.adopt(arrays | {"embedding": np.zeros((3, 2))}, folder, **names)
    with pytest.raises(lr.DataError, match="ids are 0"):
        lr.adopt(arrays, folder, fields=["label", "name"])
    lr.adopt(arrays, folder, about="one network", **names)
    with pytest.raises(lr.StaleStoreError, match=r"preprocessing\.about"):
        lr.adopt(arrays, folder, about="another", **names)


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def test_no_code_of_a_file_runs_and_no_other_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "pt").mkdir()
    torch.save({"features": Command(tmp_path)}, tmp_path / "pt/a.pt")
    np.savez(tmp_path / "f.npz", features=np.array([Command(tmp_path)], object), name=np.array(["a"]))
    for source in ("pt", "f.npz"):
        with pytest.raises(lr.DataError):
            lr.adopt(tmp_path / source, tmp_path / "states", ids=["a"])
    assert not (tmp_path / "ran").exists()
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(80))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", (10, 2), "f4", external=[(str(tmp_path / "secret"), 0, 80)])
    with pytest.raises(lr.DataError, match="another file"):
        lr.adopt(tmp_path / "f.h5", tmp_path / "states", ids=[*range(10)])
