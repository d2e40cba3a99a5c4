"""zstd gives the very values back, int8 values within half a step; both are gathered as raw ones are."""

import dataclasses

import numpy as np
import pytest
import torch
import zarr

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store import Reader, Resident, SegmentCache, Store, verify

rng = np.random.default_rng(0)
MAPS = rng.standard_normal((6, 4, 3, 3)).astype(np.float16) * np.array([1, 10, 100, 0])[:, None, None].astype(
    np.float16
)
TOKENS = [rng.standard_normal((n, 8)).astype(np.float16) for n in (3, 1, 5, 2, 4, 5)]
TENSORS = {"state.maps": MAPS, "state.tokens": TOKENS, "input.ids": np.arange(12).reshape(6, 2)}


def make(tmp_path, recipe, storage, keys, tensors=TENSORS):
    store = Store.create(tmp_path / storage.replace(":", "-"), dataclasses.replace(recipe, storage=storage))
    store.write_segment(keys[:4], {name: values[:4] for name, values in tensors.items()})
    store.write_segment(keys[4:], {name: values[4:] for name, values in tensors.items()})
    assert verify(store) == []
    return store


def padded(samples, rows):
    longest = max(len(samples[row]) for row in rows)
    return np.stack([np.pad(samples[row], ((0, longest - len(samples[row])), (0, 0))) for row in rows])


@pytest.fixture(params=[None, "cache"])
def cache(request, tmp_path):
    return request.param and SegmentCache(tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zstd_gives_the_values_of_raw(tmp_path, recipe, make_keys, cache, dtype):
    keys, rows = make_keys(6), np.array([5, 0, 3, 4, 0])
    raw, packed = (make(tmp_path, recipe, f"{codec}:{dtype}", keys) for codec in ("raw", "zstd"))
    expected = Reader(raw.path).gather(raw.rows(keys)[rows])
    found = Reader(packed.path, cache=cache).gather(packed.rows(keys)[rows])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    device = Resident(Reader(packed.path, cache=cache), packed.rows(keys), torch.device("cpu"))
    assert torch.equal(device.gather(packed.rows(keys)[rows])["state.maps"], expected["state.maps"])


def test_zstd_is_cut_into_chunks_that_any_zarr_tool_reads(tmp_path, recipe, make_keys):
    values = np.zeros((5, 3 << 20), np.float16)  # 6 MiB a row: a chunk for each
    values[:, ::1000] = rng.standard_normal(values[:, ::1000].shape)
    store = Store.create(tmp_path / "s", dataclasses.replace(recipe, storage="zstd:float16"))
    info = store.write_segment(make_keys(5), {"state.x": values})
    assert len(list((store.path / info.id / "state.x").glob("c.*"))) == 5
    assert info.bytes < values.nbytes / 10
    assert np.array_equal(zarr.open_group(store.path / info.id, mode="r")["state.x"][...], values)
    assert np.array_equal(Reader(store.path).gather(store.rows(make_keys(5)))["state.x"].numpy(), values)
    assert verify(store) == []


@pytest.mark.parametrize(("codec", "axes"), [("int8", (2, 3)), ("int8-channel", (0, 2, 3))])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_int8_is_within_half_a_step(tmp_path, recipe, make_keys, codec, axes, dtype):
    keys, rows = make_keys(6), np.array([5, 0, 3, 4, 0])
    store = make(tmp_path, recipe, f"{codec}:{dtype}", keys)
    batch = Reader(store.path).gather(store.rows(keys)[rows])
    assert batch["state.maps"].dtype == getattr(torch, dtype)
    assert torch.equal(batch["input.ids"], torch.tensor(TENSORS["input.ids"][rows]))
    step = np.abs(MAPS.astype(np.float32)).max(axes, keepdims=True) / 127
    rounding = torch.finfo(getattr(torch, dtype)).eps * np.abs(MAPS[rows].astype(np.float32))
    error = np.abs(batch["state.maps"].float().numpy() - MAPS[rows].astype(np.float32))
    assert (error <= (step[rows] if len(step) > 1 else step) / 2 * 1.001 + rounding).all()
    assert (batch["state.maps"][:, 3] == 0).all()
    tokens = padded(TOKENS, rows).astype(np.float32)
    assert batch["state.tokens"].shape == tokens.shape
    assert np.abs(batch["state.tokens"].float().numpy() - tokens).max() <= np.abs(tokens).max() / 127
    device = Resident(Reader(store.path), store.rows(keys), torch.device("cpu")).gather(store.rows(keys)[rows])
    assert all(torch.equal(device[name], tensor) for name, tensor in batch.items())


def test_int8_takes_a_byte_a_value_and_keeps_the_largest_finite(tmp_path, recipe, make_keys):
    values = np.full((4, 64, 256), np.finfo(np.float32).min, np.float32)
    values[:, 0] = 0
    store = Store.create(tmp_path / "s", dataclasses.replace(recipe, storage="int8:float32"))
    info = store.write_segment(make_keys(4), {"state.mask": values})
    assert info.bytes < 1.2 * values.size
    found = Reader(store.path).gather(store.rows(make_keys(4)))["state.mask"]
    assert torch.isfinite(found).all()
    assert torch.allclose(found, torch.from_numpy(values), rtol=1e-6)


@pytest.mark.parametrize("storage", ["raw:int8", "gzip:float16", "int8", ":float16", "raw:"])
def test_an_unknown_storage_is_refused(tmp_path, recipe, storage):
    with pytest.raises(StoreError, match="expected CODEC:DTYPE of raw, zstd, int8, int8-channel"):
        Store.create(tmp_path / "s", dataclasses.replace(recipe, storage=storage))


def test_a_segment_cache_keeps_to_its_budget(tmp_path, recipe, make_keys):
    store = Store.create(tmp_path / "s", dataclasses.replace(recipe, storage="zstd:float16"))
    for seed in range(4):
        store.write_segment(make_keys(2, seed), {"state.x": np.full((2, 500), seed, np.float16)})
    keys = np.concatenate([make_keys(2, seed) for seed in range(4)])
    room = SegmentCache(tmp_path / "cache", budget=4500)  # two segments of 2,000 bytes
    reader = Reader(store.path, cache=room)
    for _ in range(2):
        for row in range(8):
            batch = reader.gather(store.rows(keys)[np.array([row])])
            assert (batch["state.x"] == row // 2).all()
            files = [path for path in room.root.rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in files) <= 4500
    again = SegmentCache(tmp_path / "cache", budget=2500)  # what another run left counts too
    Reader(store.path, cache=again).gather(store.rows(keys)[:1])
    assert sum(path.stat().st_size for path in room.root.rglob("*") if path.is_file()) <= 2500
    with pytest.raises(StoreError, match="takes 2000 bytes of scratch, which may hold 1000"):
        Reader(store.path, cache=SegmentCache(tmp_path / "small", budget=1000)).gather(store.rows(keys)[:1])


def test_a_sample_is_checked_when_it_is_first_read(store, make_keys):
    info = store.write_segment(make_keys(3), {"state.x": np.ones((3, 4)), "state.r": [np.ones(n) for n in (1, 2, 3)]})
    chunk = store.path / info.id / "state.x" / "c.0.0"
    reader = Reader(store.path)
    rows = store.rows(make_keys(3))
    reader.gather(rows[np.array([0])])
    damaged = bytearray(chunk.read_bytes())
    damaged[0] ^= 1
    damaged[12] ^= 1
    chunk.write_bytes(damaged)
    fresh = Reader(store.path)
    fresh.gather(rows[np.array([2])])
    for row in (0, 1):
        with pytest.raises(CorruptStoreError, match=f"other bytes in row {row} than were written"):
            fresh.gather(rows[np.array([row])])
    assert Reader(store.path, check=False).gather(rows)["state.x"].shape == (3, 4)


def test_a_segment_of_another_store_is_refused(store, tmp_path, recipe, make_keys):
    other = Store.create(tmp_path / "other", dataclasses.replace(recipe, cut="layer4"))
    info = other.write_segment(make_keys(2), {"state.x": np.ones((2, 2))})
    (other.path / info.id).rename(store.path / info.id)
    store.refresh()
    with pytest.raises(CorruptStoreError, match="was written under recipe"):
        Reader(store.path).gather(store.rows(make_keys(2)))
    assert len(verify(store)) == 1


def test_sizes_are_what_samples_take(store, make_keys):
    ragged = [np.ones(n) for n in (1, 2, 3)]
    ids = [np.ones(n, np.int64) for n in (1, 2, 3)]
    store.write_segment(make_keys(3), {"state.x": np.ones((3, 4)), "state.r": ragged, "input.ids": ids})
    sizes = Reader(store.path).sizes(store.rows(make_keys(3)))
    assert sizes.tolist() == [8 + 2 + 4, 8 + 4 + 8, 8 + 6 + 12]
