"""Batches hold what was written, padded on the right; bytes that were not written are never mapped."""

import json
import os
import resource

import numpy as np
import pytest
import torch

from pipeline.errors import CorruptStoreError
from pipeline.store import FORMAT, Reader, verify


def write(store, make_keys, *units):
    """Write each unit as a segment; return the rows of all samples in the order of the units."""
    keys = []
    for seed, tensors in enumerate(units):
        keys.append(make_keys(len(next(iter(tensors.values()))), seed))
        store.write_segment(keys[-1], tensors)
    return store.rows(np.concatenate(keys))


@pytest.mark.parametrize("seed", range(5))
def test_gather_gives_rows_in_any_order_and_any_number(store, make_keys, seed):
    rng = np.random.default_rng(seed)
    values = torch.randn(60, 3, 2).half()
    ids = torch.randint(-5, 2**31 - 1, (60, 4))
    parts = np.split(np.arange(60), np.sort(rng.choice(np.arange(1, 60), 5, replace=False)))
    rows = write(store, make_keys, *({"state.x": values[part], "input.ids": ids[part]} for part in parts))
    chosen = rng.integers(0, 60, 50)
    for order in (chosen, chosen[np.argsort(rows.segment[chosen])]):
        batch = Reader(store.path).gather(rows[order])
        assert torch.equal(batch["state.x"], values[order])
        assert torch.equal(batch["input.ids"], ids[order])
        assert batch["input.ids"].dtype == torch.int64


def test_a_batch_is_in_memory_of_its_own(store, make_keys):
    rows = write(store, make_keys, {"state.x": np.ones((3, 2))})
    reader = Reader(store.path)
    for batch in (reader.gather(rows), reader.gather(rows)):
        assert (batch["state.x"] == 1).all()
        batch["state.x"].zero_()


def test_mixed_ranges_give_float32(store, make_keys):
    small, large = torch.rand(2, 3), torch.rand(2, 3) * 1e6
    rows = write(store, make_keys, {"state.x": small}, {"state.x": large})
    reader = Reader(store.path)
    assert reader.gather(rows[np.arange(2)])["state.x"].dtype == torch.float16
    only_large = reader.gather(rows[np.arange(2, 4)])["state.x"]
    assert only_large.dtype == torch.bfloat16
    assert torch.equal(only_large, large.bfloat16())
    mixed = reader.gather(rows)["state.x"]
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, torch.cat([small.half().float(), large.bfloat16().float()]))


@pytest.mark.parametrize("axis", [0, 1])
def test_ragged_samples_are_padded_to_the_longest_of_the_batch(store, make_keys, axis):
    lengths = [3, 1, 0, 5, 2, 2, 4]
    samples = [torch.randn((n, 2) if axis == 0 else (2, n)).half() for n in lengths]
    masks = [torch.ones(n, dtype=torch.int64) for n in lengths]
    # The second segment has samples of one length: it is stored without offsets.
    parts = [range(4), range(4, 6), range(6, 7)]
    rows = write(
        store,
        make_keys,
        *({"state.x": [samples[i] for i in part], "input.mask": [masks[i] for i in part]} for part in parts),
    )
    for chosen in ([3, 0], [2, 1], [4, 5], [6, 4, 2, 0], [2]):
        batch = Reader(store.path).gather(rows[np.array(chosen)], {"input.mask": -1})
        longest = max(lengths[i] for i in chosen)
        assert batch["state.x"].shape == ((len(chosen), longest, 2) if axis == 0 else (len(chosen), 2, longest))
        for row, i in enumerate(chosen):
            expected = torch.zeros(batch["state.x"].shape[1:]).half()
            expected.narrow(axis, 0, lengths[i]).copy_(samples[i])
            assert torch.equal(batch["state.x"][row], expected)
            assert batch["input.mask"][row].tolist() == [1] * lengths[i] + [-1] * (longest - lengths[i])


def test_no_rows_and_empty_tensors(store, make_keys):
    rows = write(store, make_keys, {"state.x": np.zeros((2, 0, 3)), "state.s": np.array([1.0, 2.0])})
    reader = Reader(store.path)
    batch = reader.gather(rows)
    assert batch["state.x"].shape == (2, 0, 3)
    assert batch["state.s"].tolist() == [1.0, 2.0]
    assert reader.gather(rows[np.array([], int)]) == {}


def test_opening_is_lazy_and_takes_no_descriptors(store, make_keys):
    rows = write(store, make_keys, *({"state.x": np.full((1, 1), i)} for i in range(60)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = Reader(store.path)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # Others of this process may stand open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    try:
        assert reader.gather(rows)["state.x"].flatten().tolist() == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (store.path / rows.segments[0] / "zarr.json").unlink()
    lazily = Reader(store.path)
    lazily.gather(rows[rows.segment != 0])
    with pytest.raises(CorruptStoreError):
        lazily.gather(rows)


def test_segments_with_other_tensors_are_refused(store, make_keys):
    rows = write(store, make_keys, {"state.x": np.ones((1, 1))}, {"state.y": np.ones((1, 1))})
    with pytest.raises(CorruptStoreError, match="has tensors"):
        Reader(store.path).gather(rows)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def attributes(segment):
    return json.loads((segment / "zarr.json").read_text())["attributes"]


def grid(*shape):
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


HARM = {
    "truncated chunk": lambda s: (s / "state.x/c.0.0").write_bytes(b"123"),
    "longer chunk": lambda s: (s / "state.x/c.0.0").write_bytes(bytes(1000)),
    "no chunk": lambda s: (s / "state.x/c.0.0").unlink(),
    "gigantic shape": lambda s: edit(s / "state.x/zarr.json", shape=[4, 10**15], chunk_grid=grid(4, 10**15)),
    "overflowing shape": lambda s: edit(s / "state.x/zarr.json", shape=[2**63, 2], chunk_grid=grid(2**63, 2)),
    "negative shape": lambda s: edit(s / "state.x/zarr.json", shape=[-4, -2], chunk_grid=grid(-4, -2)),
    "no axes": lambda s: edit(s / "state.x/zarr.json", shape=[], chunk_grid=grid()),
    "fractional shape": lambda s: edit(s / "state.x/zarr.json", shape=[4.0, 2], chunk_grid=grid(4, 2)),
    "other number of samples": lambda s: edit(s / "state.x/zarr.json", shape=[2, 4], chunk_grid=grid(2, 4)),
    "several chunks": lambda s: edit(s / "state.x/zarr.json", chunk_grid=grid(2, 2)),
    "object dtype": lambda s: edit(s / "state.x/zarr.json", data_type="object"),
    "dtype attribute": lambda s: edit(s / "state.x/zarr.json", attributes={"dtype": "__class__"}),
    "ragged axis": lambda s: edit(s / "state.x/zarr.json", attributes={"dtype": "float16", "ragged_axis": 7}),
    "missing offsets": lambda s: edit(s / "state.x/zarr.json", attributes={"dtype": "float16", "ragged_axis": 0}),
    "compressed": lambda s: edit(s / "state.x/zarr.json", codecs=[{"name": "bytes"}, {"name": "gzip"}]),
    "big endian": lambda s: edit(
        s / "state.x/zarr.json", codecs=[{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]
    ),
    "no JSON": lambda s: (s / "state.x/zarr.json").write_text("{"),
    "deep JSON": lambda s: (s / "state.x/zarr.json").write_text("[" * 100_000),
    "endless JSON": lambda s: (s / "state.x/zarr.json").write_text(" " * (5 << 20)),
    "a list": lambda s: (s / "state.x/zarr.json").write_text("[]"),
    "a group": lambda s: edit(s / "state.x/zarr.json", node_type="group"),
    "path as name": lambda s: edit(s / "zarr.json", attributes=attributes(s) | {"tensors": ["../x"]}),
    "another format": lambda s: edit(s / "zarr.json", attributes=attributes(s) | {"format": FORMAT + 1}),
    "no attributes": lambda s: edit(s / "zarr.json", attributes=None),
    "unsorted offsets": lambda s: _rewrite(s / "state.r.offsets/c.0", np.array([0, 3, 1, 4, 6])),
    "offsets past the end": lambda s: _rewrite(s / "state.r.offsets/c.0", np.array([0, 1, 2, 3, 7])),
    "offsets below zero": lambda s: _rewrite(s / "state.r.offsets/c.0", np.array([-1, 1, 2, 3, 6])),
}


def _rewrite(path, values):
    path.write_bytes(values.tobytes() + path.read_bytes()[-4:])


@pytest.mark.parametrize("harm", HARM)
def test_what_was_not_written_is_never_mapped(store, make_keys, harm):
    tensors = {"state.x": np.ones((4, 2)), "state.r": [np.ones(n) for n in (0, 1, 2, 3)]}
    rows = write(store, make_keys, tensors)
    assert verify(store) == []
    segment = store.path / rows.segments[0]
    HARM[harm](segment)
    with pytest.raises(CorruptStoreError) as error:
        Reader(store.path).gather(rows)
    assert str(segment) in str(error.value)
    assert "encode again" in str(error.value)
    assert len(verify(store)) == 1


def test_the_keys_must_be_those_of_the_segments_name(store, make_keys):
    write(store, make_keys, {"state.x": np.ones((2, 2))})
    (segment,) = store.segments()
    (store.path / segment).rename(store.path / ("0" * 32))
    store.refresh()
    with pytest.raises(CorruptStoreError, match=f"holds the samples of segment {segment}"):
        store.keys()


@pytest.mark.parametrize("array", ["state.x", "state.r", "state.r.offsets", "keys", "input.i"])
def test_verify_finds_one_flipped_bit(store, make_keys, array):
    tensors = {"state.x": np.ones((2, 2)), "state.r": [np.ones(1), np.ones(2)], "input.i": np.ones((2, 2), np.int64)}
    write(store, make_keys, tensors)
    (segment,) = store.segments()
    (chunk,) = (store.path / segment / array).glob("c.*")
    damaged = bytearray(chunk.read_bytes())
    damaged[-5] ^= 1  # the last byte of the values
    chunk.write_bytes(damaged)
    (fault,) = verify(store)
    assert str(store.path / segment) in fault


def test_verify_finds_strays(store, make_keys):
    write(store, make_keys, {"state.x": np.ones((2, 2))})
    (segment,) = store.segments()
    (store.path / segment / "notes").write_text("")
    (fault,) = verify(store)
    assert fault.endswith("notes is no part of the segment; remove it")
