"""The contract of every registered codec: a store in it is sound, and gives what `round_trip` predicted."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import CorruptStoreError
from pipeline.store import CODECS, Reader, Store, apply_changes, plan_removal, round_trip, verify
from pipeline.store.format.layout import is_tensor_name
from pipeline.store.format.metadata import read_array_spec

rng = np.random.default_rng(0)
N = 6
STATES = {
    "state.vectors": list(torch.from_numpy(rng.standard_normal((N, 8)))),
    "state.maps": list(torch.from_numpy(rng.standard_normal((N, 4, 3, 3)))),
    "state.tokens": [torch.from_numpy(rng.standard_normal((length, 8))) for length in (3, 1, 5, 2, 4, 5)],
    "state.none": [torch.zeros(0, 3)] * N,
}
OTHERS = {"input.ids": list(torch.arange(N * 2).reshape(N, 2)), "input.mask": [torch.ones(3) for _ in range(N)]}


@pytest.fixture(params=CODECS)
def codec(request):
    return CODECS[request.param]


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def storage(request, codec):
    return f"{codec.name}:{request.param}"


@pytest.fixture
def store(tmp_path, recipe, make_keys, storage):
    store = Store.create(tmp_path / "store", dataclasses.replace(recipe, storage=storage))
    store.write_segment(make_keys(N), STATES | OTHERS)
    return store


def samples(store, keys, name):
    reader, rows = Reader(store.path), store.rows(keys)
    places = zip(rows.segment.tolist(), rows.row.tolist(), strict=True)
    return [reader.segment(rows.segments[segment]).tensors[name].sample(row) for segment, row in places]


def test_a_store_gives_what_the_round_trip_predicted(store, make_keys, storage, codec):
    assert verify(store) == []
    for name, values in (STATES | OTHERS).items():
        expected, nbytes = round_trip(name, values, storage)
        assert all(map(torch.equal, samples(store, make_keys(N), name), expected)), name
        folders = store.path.glob(f"*/{name}*")
        chunks = [file.stat().st_size - 4 for folder in folders for file in folder.glob("c.*")]
        assert sum(chunks) == nbytes, name
        if codec.is_lossless or name in OTHERS:
            dtype = getattr(torch, storage.partition(":")[2]) if values[0].is_floating_point() else torch.int64
            assert all(torch.equal(one, value.to(dtype)) for one, value in zip(expected, values, strict=True))


def test_what_is_kept_of_a_segment_keeps_its_bits(store, make_keys):
    keys = make_keys(N)
    before = {name: samples(store, keys[1:], name) for name in STATES}
    assert apply_changes(store, plan_removal(store.path, keys[:1]).changes) == []
    assert verify(store) == []
    for name, expected in before.items():
        assert all(map(torch.equal, samples(store, keys[1:], name), expected)), name


def test_metadata_says_how_to_read_an_array(store, codec):
    (array,) = store.path.glob("*/state.maps")
    found = read_array_spec(array)
    assert (found.codec.is_mappable, found.codec.is_lossless) == (codec.is_mappable, codec.is_lossless)
    assert found.codec.beside == codec.beside
    assert all((array.parent / f"state.maps{suffix}").is_dir() for suffix in codec.beside)
    assert not any(is_tensor_name(f"state.maps{suffix}") for suffix in codec.beside)


def test_a_damaged_chunk_is_refused_by_the_decoder(store, codec, tmp_path):
    if codec.is_mappable:
        assert codec.max_chunk_bytes == sys.maxsize
        return
    chunk = np.arange(4096, dtype=np.float32).reshape(64, 64)
    packed, out = codec.compress(chunk), np.empty_like(chunk)
    codec.decompress(tmp_path, packed, out)
    assert np.array_equal(out, chunk)
    for damaged in (packed[:-1], packed[:8], packed[:0], np.concatenate([packed, packed])):
        with pytest.raises(CorruptStoreError):
            codec.decompress(tmp_path, damaged, out)
    with pytest.raises(CorruptStoreError):
        codec.decompress(tmp_path, packed, np.empty((65, 64), np.float32))
