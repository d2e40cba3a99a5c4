"""States without a network, as tensors and as files for other programs: equal bytes out as stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from own_networks import Items
from safetensors.torch import load_file
from test_library import build

import layer_recycling as lr
from stages.store import command


@pytest.fixture(params=["resnet", "bert"])
def encoded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[lr.StateStore, Path]:
    case, model, example = build(request.param)
    prefix, _ = lr.split(model, case.at, example)
    folder = tmp_path / "states"
    return lr.encode(Items(case.items()), prefix, folder, collate_fn=case.collate), folder


def test_states_are_found_by_key_without_a_network(encoded: tuple[lr.StateStore, Path]) -> None:
    store, folder = encoded
    states = lr.open_states(folder)
    assert states.keys == store.keys
    batch = states.of_keys([store.keys[3], store.keys[1]])
    expected = store.collate([store.dataset()[3], store.dataset()[1]])
    torch.testing.assert_close(batch["state"], expected["state"], rtol=0, atol=0)
    with pytest.raises(lr.MissingKeysError, match="00"):
        states.of_keys(["00"])


def read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path) as file:
            return {name: file[name][:] for name in file}
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("form", ["parquet", "npz", "h5", "safetensors"])
def test_exported_files_hold_the_stored_values(form: str, encoded: tuple[lr.StateStore, Path]) -> None:
    store, folder = encoded
    out = folder.parent / f"out.{form}"
    done = CliRunner().invoke(command, ["export", str(folder), str(out)])
    assert done.output == f"10 items in {out}\n"
    found, items = read(out), list(store.dataset())
    for name in items[0]["state"]:
        values = found[f"state.{name}"]
        flat = np.concatenate([np.asarray(one).reshape(-1) for one in values])
        expected = np.concatenate([item["state"][name].numpy().reshape(-1) for item in items])
        assert flat.astype(np.float16).tobytes() == expected.tobytes()
        ragged = len({item["state"][name].shape for item in items}) > 1
        if ragged or form == "parquet":
            shapes = [list(item["state"][name].shape) for item in items]
            assert np.asarray(found[f"state.{name}.shape"]).tolist() == shapes
    keys = [key.hex() if form == "parquet" else bytes(key.tolist()).hex() for key in found["key"]]
    assert keys == store.keys
    labels = "labels" if "labels" in found else "1"
    assert np.asarray(found[labels]).tolist() == [item[labels] for item in items]


def test_another_format_is_refused(encoded: tuple[lr.StateStore, Path]) -> None:
    with pytest.raises(lr.RecyclingError, match="parquet, npz, h5, safetensors"):
        lr.export_states(encoded[0], encoded[1] / "out.csv")
