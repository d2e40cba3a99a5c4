"""Samples held on a device give the batches that the memory maps give."""

import numpy as np
import pytest
import torch

from pipeline.errors import StoreError
from pipeline.store import Reader, Resident

CPU = torch.device("cpu")


def fixed(rng, n):
    return {
        "state.x": rng.normal(size=(n, 3, 2)),
        "input.ids": rng.integers(0, 9, (n, 4)),
        "state.s": rng.normal(size=n),
    }


def first_axis(rng, n):
    lengths = rng.integers(0, 5, n)
    return {"state.x": [rng.normal(size=(m, 2)) for m in lengths], "input.mask": [np.ones(m, int) for m in lengths]}


def later_axis(rng, n):
    return {"state.x": [rng.normal(size=(2, m, 3)) for m in rng.integers(0, 5, n)]}


def fixed_within_segments(rng, n):
    return {"state.x": rng.normal(size=(n, 2, rng.integers(1, 9)))}


def other_ranges(rng, n):
    return {"state.x": rng.normal(size=(n, 3)) * rng.choice([1, 1e6])}


def empty(rng, n):
    return {"state.x": [np.zeros((0, 3)) for _ in range(n)], "state.y": np.zeros((n, 2, 0))}


KINDS = [fixed, first_axis, later_axis, fixed_within_segments, other_ranges, empty]


@pytest.fixture
def written(store, make_keys, request):
    rng = np.random.default_rng(3)
    sizes = [1, 6, 2, 5, 4]
    for seed, size in enumerate(sizes):
        store.write_segment(make_keys(size, seed), request.param(rng, size))
    return store, np.concatenate([make_keys(size, seed) for seed, size in enumerate(sizes)])


@pytest.mark.parametrize("written", KINDS, indirect=True)
@pytest.mark.parametrize("part", [slice(None), slice(2, 15, 3)])
def test_the_same_batches_as_from_the_maps(written, part):
    store, keys = written
    reader = Reader(store.path)
    rows = store.rows(keys[part])
    resident = Resident(reader, rows, CPU)
    rng = np.random.default_rng(0)
    for chosen in [np.arange(len(rows)), *(rng.integers(0, len(rows), 4) for _ in range(10))]:
        expected = reader.gather(rows[chosen], {"input.mask": -3})
        got = resident.gather(rows[chosen], {"input.mask": -3})
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name].double(), tensor.double()), name
            assert got[name].dtype == torch.promote_types(got[name].dtype, tensor.dtype)


@pytest.mark.parametrize("written", KINDS, indirect=True)
def test_its_size_is_told_before_it_is_paid(written):
    store, keys = written
    reader = Reader(store.path)
    rows = store.rows(np.concatenate([keys, keys[:3]]))
    held = Resident(reader, rows, CPU)
    assert Resident.nbytes(reader, rows) == sum(block.values.nbytes for block in held._tensors.values())


@pytest.mark.parametrize("written", [fixed], indirect=True)
def test_samples_that_are_not_held_are_refused(written):
    store, keys = written
    resident = Resident(Reader(store.path), store.rows(keys[:5]), CPU)
    with pytest.raises(StoreError, match="not held"):
        resident.gather(store.rows(keys[4:6]))


def test_two_ragged_axes_stay_on_the_host(store, make_keys):
    for seed, shape in enumerate([(2, 3), (4, 5)]):
        store.write_segment(make_keys(1, seed), {"state.x": np.ones((1, *shape))})
    rows = store.rows(store.keys())
    reader = Reader(store.path)
    assert reader.gather(rows)["state.x"].shape == (2, 4, 5)
    with pytest.raises(StoreError, match=r"ragged in axes \[0, 1\]"):
        Resident(reader, rows, CPU)
