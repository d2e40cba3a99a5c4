"""Stores that were written once stay readable for ever: by this package, by a stranger's reader, by any zarr 3 tool."""

import json
import re
from pathlib import Path

import golden_reader
import make_golden
import numpy as np
import pytest
import torch
import zarr

from pipeline.store import Reader, Store, segment_id, verify

CODECS = make_golden.CODECS


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(make_golden.EXPECTED, allow_pickle=False) as file:
        return dict(file)


def segments(expected: dict[str, np.ndarray], codec: str) -> dict[str, dict[str, np.ndarray]]:
    """What each segment of a store holds, by its id."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, values in expected.items():
        of, number, what = name.split("/")
        if of == codec:
            parts.setdefault(number, {})[what] = values
    return {str(part["id"]): part for part in parts.values()}


def samples(part: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The samples of each tensor of a segment, as they are read."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in part.items():
        tensor, is_sample, _ = name.partition("#")
        if is_sample:
            found.setdefault(tensor, []).append(values)
    return found


def is_equal(read: np.ndarray, wanted: np.ndarray) -> bool:
    """Same shape, same values; bf16 is its bits in `wanted`, and may be float32 in `read`."""
    if wanted.dtype == np.uint16 and read.dtype == np.float32:
        wanted = (wanted.astype(np.uint32) << 16).view(np.float32)
    return read.shape == wanted.shape and np.array_equal(read, wanted)


@pytest.mark.parametrize("codec", CODECS)
def test_this_version_reads_it(codec, expected):
    store = Store.open(make_golden.STORES / codec, make_golden.recipe(codec))
    assert verify(store) == []
    parts = segments(expected, codec)
    assert store.segments() == sorted(parts)
    reader = Reader(store.path)
    for part in parts.values():
        rows = store.rows(part["keys"])
        batch = reader.gather(rows)
        assert batch.keys() == samples(part).keys()
        for name, wanted in samples(part).items():
            for got, one in zip(batch[name], wanted, strict=True):
                own = got[tuple(slice(length) for length in one.shape)]  # without padding
                bits = own.view(torch.int16) if own.dtype == torch.bfloat16 else own
                assert np.array_equal(bits.numpy().view(one.dtype) if own.dtype == torch.bfloat16 else bits, one), name
                assert not got.flatten().tolist() or got.double().abs().sum() == own.double().abs().sum()
    bad = np.concatenate([part["set_aside"] for part in parts.values()])
    assert sorted(store.set_aside().tolist()) == sorted(bad.tolist())


def test_the_documents_examples_are_right():
    document = (Path(__file__).parents[2] / "docs/store-format.md").read_text(encoding="utf-8")
    (canonical,) = re.findall(r"^    (\{.*\})$", document, re.MULTILINE)
    recipe = make_golden.recipe("raw")
    assert golden_reader.digest(json.loads(canonical)) == recipe.digest
    assert f"has the digest `{recipe.digest}`" in document
    assert f"the id `{segment_id(np.zeros((1, 16), np.uint8))}`" in document


@pytest.mark.parametrize("codec", CODECS)
def test_a_reader_written_from_the_document_reads_it(codec, expected):
    parts = segments(expected, codec)
    for name, keys, bad, tensors in golden_reader.read_store(make_golden.STORES / codec):
        part = parts.pop(name)
        assert np.array_equal(keys, part["keys"])
        assert bad == [key.tobytes().hex() for key in part["set_aside"]]
        assert tensors.keys() == samples(part).keys()
        for tensor, wanted in samples(part).items():
            assert all(map(is_equal, tensors[tensor], wanted)), tensor
            assert len(tensors[tensor]) == len(wanted)
    assert not parts


def by_zarr(folder: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(folder, mode="r", zarr_format=3)
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


def by_tensorstore(folder: Path) -> dict[str, np.ndarray]:
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is in the extra `dev`")
    read = {}
    for array in sorted(folder.glob("*/zarr.json")):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array.parent}/"}}
        read[array.parent.name] = tensorstore.open(spec, read=True).result().read().result()
    return read


def by_xarray(folder: Path) -> dict[str, np.ndarray]:
    xarray = pytest.importorskip("xarray", reason="xarray is in the extra `dev`")
    with xarray.open_zarr(folder, chunks=None, consolidated=False, zarr_format=3) as data:
        assert {array.sizes["sample"] for array in data.values() if "sample" in array.dims} == {data.attrs["samples"]}
        return {str(name): array.to_numpy() for name, array in data.variables.items()}


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore, by_xarray])
@pytest.mark.parametrize("codec", CODECS)
def test_any_zarr_implementation_reads_it(codec, read, expected):
    for name, part in segments(expected, codec).items():
        arrays = read(make_golden.STORES / codec / name)
        stored = {key: values for key, values in part.items() if "#" not in key and key not in ("id", "set_aside")}
        assert arrays.keys() == stored.keys() | {"sums"}
        for array, wanted in stored.items():
            assert arrays[array].dtype == wanted.dtype, array
            assert np.array_equal(arrays[array], wanted), array
