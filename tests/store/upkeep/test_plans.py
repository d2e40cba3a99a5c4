"""gc, compact and rm-samples: what is kept keeps every bit, what goes is gone, and a kill in between loses nothing."""

import dataclasses
import multiprocessing
import os
import random
import time

import numpy as np
import pytest
import torch

from pipeline.errors import StoreError
from pipeline.store import (
    KeySet,
    Reader,
    Store,
    apply_changes,
    exclusive_access,
    plan_compact,
    plan_gc,
    plan_removal,
    verify,
)
from pipeline.store.format.metadata import read_segment_spec
from pipeline.store.local.stored_tensor import as_numpy
from pipeline.store.upkeep import rewrite as module

N, UNIT, RAGGED = 23, 4, 3
LATER = time.time() + 3600
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pipeline.store"])


def fill(path, recipe, keys, set_aside=None):
    """Segments of four samples: an array, one of a ragged axis that is not the first, and ids."""
    rng = np.random.default_rng(0)
    store = Store.create(path, recipe)
    for begin in range(0, len(keys), UNIT):
        unit = keys[begin : begin + UNIT]
        tensors = {
            "state.x": rng.normal(size=(len(unit), 5, 6)).astype(np.float32),
            "state.r": [rng.normal(size=(2, 1 + (begin + i) % RAGGED)).astype(np.float32) for i in range(len(unit))],
            "input.ids": rng.integers(0, 9, (len(unit), 2)),
        }
        store.write_segment(unit, tensors, set_aside=None if set_aside is None else set_aside[[begin // UNIT]])
    return Store.open(path)


def contents(store, keys):
    """The stored bits of each sample by key and name, with those of its scales."""
    reader, found = Reader(store.path), {}
    rows = store.rows(keys)
    for key, number, row in zip(keys, rows.segment, rows.row, strict=True):
        for name, tensor in reader.segment(rows.segments[number]).tensors.items():
            sample = tensor.sample(int(row))
            found[key.tobytes(), name] = (tuple(sample.shape), sample.dtype, as_numpy(sample).tobytes())
    return found


@pytest.fixture
def keys(make_keys):
    return make_keys(N)


@pytest.fixture
def store(tmp_path, recipe, keys, make_keys):
    return fill(tmp_path / "store", recipe, keys, make_keys(6, seed=9))


@pytest.mark.parametrize("storage", ["raw:float16", "raw:bfloat16", "zstd:float16", "int8:float16", "raw:float32"])
def test_compact_merges_without_changing_a_bit(tmp_path, recipe, keys, make_keys, storage):
    bad = make_keys(6, seed=9)
    store = fill(tmp_path / "other", dataclasses.replace(recipe, storage=storage), keys, bad)
    before = contents(store, keys)
    upkeep = plan_compact(store.path, store.recipe, target=10)
    assert (upkeep.samples, upkeep.segments, upkeep.new_segments, upkeep.left) == (0, 6, 3, [])
    size = store.nbytes()
    with exclusive_access(store.path):
        assert apply_changes(store, upkeep.changes) == []
    assert size - store.nbytes() == pytest.approx(upkeep.bytes, abs=600)
    assert sorted(read_segment_spec(store.path / segment).samples for segment in store.segments()) == [7, 8, 8]
    assert contents(store, keys) == before
    assert sorted(map(bytes, store.set_aside())) == sorted(map(bytes, bad))
    assert verify(store) == []
    assert plan_compact(store.path, store.recipe, target=10).changes == []


def test_scales_of_channels_are_not_merged(tmp_path, recipe, keys, fingerprint):
    store = fill(tmp_path / "other", dataclasses.replace(recipe, storage="int8-channel:float16"), keys)
    upkeep = plan_compact(store.path, store.recipe, target=100)
    assert upkeep.changes == []
    assert upkeep.left == ["6 small segments have scales per channel, which cannot be merged"]
    before = contents(store, keys)
    apply_changes(store, plan_gc(store.path, KeySet(keys[[0, 1, 3]]), LATER, rewrite=True).changes)
    assert contents(store, keys[[0, 1, 3]]).items() <= before.items()
    assert verify(store) == []


def test_only_equal_layouts_are_merged(tmp_path, recipe, make_keys):
    store = Store.create(tmp_path / "other", recipe)
    for seed, width in enumerate([2, 3, 2, 3, 4]):
        store.write_segment(make_keys(2, seed), {"state.x": np.ones((2, width))})
    store.write_segment(make_keys(2, 7), {"state.x": np.full((2, 2), 1e6)})  # leaves fp16, stored as bf16
    upkeep = plan_compact(store.path, recipe, target=100)
    assert (upkeep.segments, upkeep.new_segments) == (4, 2)
    apply_changes(store, upkeep.changes)
    assert len(store.segments()) == 4
    assert len(store.keys()) == 12
    assert verify(store) == []


def test_gc_takes_segments_that_no_table_names_and_nothing_newer_than_the_table(store, keys):
    used = KeySet(keys[UNIT + 1 : 4 * UNIT])  # not the first unit, not all of the second, not the fifth and sixth
    before = contents(store, keys)
    early = plan_gc(store.path, used, written=time.time() - 3600)
    assert early.changes == []
    assert early.left[0].startswith("4 segments with samples that no table names are not older than the sample table")
    upkeep = plan_gc(store.path, used, LATER)
    assert (upkeep.segments, upkeep.new_segments, upkeep.samples) == (3, 0, 11)
    assert upkeep.left == ["1 segments hold 1 samples that no table names beside others; --rewrite takes them"]
    size = store.nbytes()
    apply_changes(store, upkeep.changes)
    assert size - store.nbytes() == upkeep.bytes
    assert store.missing(keys).tolist() == [True] * 4 + [False] * 12 + [True] * 7
    rest = plan_gc(store.path, used, LATER, rewrite=True)
    assert (rest.segments, rest.new_segments, rest.samples, rest.left) == (1, 1, 1, [])
    apply_changes(store, rest.changes)
    kept = keys[UNIT + 1 : 4 * UNIT]
    assert store.missing(keys).tolist() == [True] * 5 + [False] * 11 + [True] * 7
    assert contents(store, kept).items() <= before.items()
    assert verify(store) == []


def test_a_merged_segment_is_as_old_as_the_youngest_it_is_made_of(store, keys):
    for number, segment in enumerate(store.segments()):
        os.utime(store.path / segment / "zarr.json", (1000 + number, 1000 + number))
    apply_changes(store, plan_compact(store.path, store.recipe, target=100).changes)
    (segment,) = store.segments()
    assert (store.path / segment / "zarr.json").stat().st_mtime == 1005
    assert plan_gc(store.path, KeySet(keys[:0]), 1005).changes == []
    assert plan_gc(store.path, KeySet(keys[:0]), 1006).samples == N


def test_a_stop_between_commit_and_removal_leaves_copies_which_the_next_run_removes(store, keys, monkeypatch):
    before = contents(store, keys)

    def stop(path):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "discard", stop)
        with pytest.raises(OSError, match="killed"):
            apply_changes(store, plan_compact(store.path, store.recipe, target=9).changes)
    store.refresh()
    assert len(store.segments()) == 7
    assert contents(store, keys) == before
    for plan in (plan_compact(store.path, store.recipe, target=9), plan_gc(store.path, KeySet(keys), LATER)):
        redundant = [change for change in plan.changes if change.holders]
        assert [len(change.kept) for change in redundant] == [1, 1]
    apply_changes(store, plan_compact(store.path, store.recipe, target=9).changes)
    assert contents(store, keys) == before
    assert len(store.keys()) == N
    assert verify(store) == []


def test_a_redundant_segment_stays_while_its_copies_are_broken(store, keys):
    joined = keys[: 2 * UNIT]
    store.write_segment(joined, {name: [np.zeros((1, 1))] * 8 for name in ("state.x", "state.r", "input.ids")})
    store.refresh()
    changes = [change for change in plan_gc(store.path, KeySet(keys), LATER).changes if change.holders]
    assert len(changes) == 2
    holder = store.path / changes[0].holders[0] / "state.x" / "c.0.0.0"
    raw = bytearray(holder.read_bytes())
    raw[0] ^= 1
    holder.write_bytes(raw)
    faults = apply_changes(store, changes)
    assert len(faults) == 1
    assert "has other bytes in row 0" in faults[0]
    assert len(store.segments()) == 6


def test_a_corrupt_segment_is_named_and_left_and_the_others_are_merged(store, keys):
    segment = store.segments()[0]
    chunk = store.path / segment / "state.x" / "c.0.0.0"
    raw = bytearray(chunk.read_bytes())
    raw[7] ^= 1
    chunk.write_bytes(raw)
    faults = apply_changes(store, plan_compact(store.path, store.recipe, target=9).changes)
    assert len(faults) == 1
    assert segment in faults[0]
    assert segment in store.segments()
    assert len(store.segments()) == 4
    assert not store.missing(keys).any()


def files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("storage", ["raw:float32", "int8:float32", "int8-channel:float32"])
def test_removed_samples_leave_no_byte_behind(tmp_path, recipe, keys, make_keys, storage):
    bad = make_keys(6, seed=9)
    store = fill(tmp_path / "other", dataclasses.replace(recipe, storage=storage), keys, bad)
    gone, kept = keys[[1, 5, 6, 20, 21, 22]], np.delete(keys, [1, 5, 6, 20, 21, 22], 0)
    before = contents(store, keys)
    reader, rows = Reader(store.path), store.rows(gone)
    traces = [key.tobytes() for key in gone] + [bad[3].tobytes().hex().encode()]
    for number, row in zip(rows.segment, rows.row, strict=True):
        tensor = reader.segment(rows.segments[number]).tensors["state.x"]
        traces.append(tensor.values[row].contiguous().view(torch.uint8).numpy().tobytes())
    assert all(any(trace in data for data in files(store.path).values()) for trace in traces)
    upkeep = plan_removal(store.path, np.concatenate([gone, bad[[3]]]))
    assert (upkeep.samples, upkeep.segments, upkeep.new_segments) == (6, 4, 3)
    assert apply_changes(store, upkeep.changes) == []
    assert not any(trace in data for data in files(store.path).values() for trace in traces)
    assert store.missing(gone).all()
    assert contents(store, kept) == {name: value for name, value in before.items() if name[0] in set(map(bytes, kept))}
    assert verify(store) == []
    assert {bytes(key) for key in bad[[0, 1, 2, 4]]} <= set(map(bytes, store.set_aside()))
    assert plan_removal(store.path, gone).changes == []


def test_nothing_is_changed_under_a_writer(tmp_path, recipe, make_keys):
    writer = Store.create(tmp_path / "other", recipe)
    store = Store.open(writer.path)
    with pytest.raises(StoreError, match="somebody is writing to this store"), exclusive_access(store.path):
        pass
    del writer
    with exclusive_access(store.path), pytest.raises(StoreError, match="somebody"), exclusive_access(store.path):
        pass
    with exclusive_access(store.path), pytest.raises(StoreError, match="somebody removes or merges its segments"):
        Store.create(store.path, recipe)
    Store.create(store.path, recipe).write_segment(make_keys(1), {"state.x": np.ones((1, 1))})


def test_an_open_reader_reads_on_and_one_that_comes_late_is_told(store, keys):
    early, late, rows = Reader(store.path), Reader(store.path), store.rows(keys)
    for segment in store.segments():
        early.segment(segment)
    apply_changes(store, plan_compact(store.path, store.recipe, target=100).changes)
    again = Reader(store.path).gather(store.rows(keys))
    before = early.gather(rows)
    assert all(torch.equal(before[name], again[name]) for name in before)
    with pytest.raises(StoreError, match="was there when the store was opened, and is gone"):
        late.gather(rows)


def compact(path, started):
    started.set()
    store = Store.open(path)
    with exclusive_access(store.path):
        apply_changes(store, plan_compact(path, store.recipe, target=9).changes)


def test_killed_at_any_moment_a_compaction_loses_nothing_and_is_finished_by_the_next(tmp_path, recipe, make_keys):
    keys = make_keys(64)
    store = fill(tmp_path / "killed", recipe, keys)
    before, draw, kills = contents(store, keys), random.Random(0), 0
    while kills < 4:
        started = PROCESSES.Event()
        process = PROCESSES.Process(target=compact, args=(store.path, started))
        process.start()
        assert started.wait(60)
        process.join(draw.uniform(0, 0.1))
        kills += 1
        process.kill()
        process.join()
        store.refresh()
        assert contents(store, keys) == before
    apply_changes(store, plan_compact(store.path, recipe, target=9).changes)
    assert len(store.segments()) == 8
    assert contents(store, keys) == before
    assert verify(store) == []
