"""A store proves its recipe, and a segment is written once, whole, the same way every time."""

import dataclasses
import os
import resource

import numpy as np
import pytest
import torch
import zarr

from pipeline.errors import CorruptStoreError, MissingKeysError, StaleStoreError, StoreError
from pipeline.store import FORMAT, Store, segment_id, verify


def test_create_twice_is_open(store, recipe, make_keys):
    store.write_segment(make_keys(3), {"state.x": np.ones((3, 2))})
    again = Store.create(store.path, recipe)
    assert again.segments() == store.segments()
    assert Store.open(store.path).recipe == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "f" * 32}, f"weights = '{'0' * 32}', expected '{'f' * 32}'"),
        ({"preprocessing": {"image_size": 256}}, "preprocessing.image_size = 224, expected 256"),
        ({"storage": "raw:float32"}, "storage = 'raw:float16', expected 'raw:float32'"),
    ],
)
@pytest.mark.parametrize("method", [Store.create, Store.open])
def test_another_recipe_is_refused(store, recipe, change, message, method):
    with pytest.raises(StaleStoreError, match=message):
        method(store.path, dataclasses.replace(recipe, **change))


def test_a_folder_that_is_no_store_is_refused(tmp_path, recipe):
    with pytest.raises(StoreError, match="encode first"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'notes.txt' and no recipe.json"):
        Store.create(tmp_path, recipe)
    with pytest.raises(StoreError, match="no store can be made here"):
        Store.create(tmp_path / "notes.txt", recipe)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00"])
def test_a_broken_recipe_is_named(store, text):
    (store.path / "recipe.json").write_text(text)
    with pytest.raises(CorruptStoreError, match=r"recipe.json"):
        Store.open(store.path)


def test_another_format_is_refused(store, recipe, tmp_path):
    newer = dataclasses.replace(recipe, format=FORMAT + 1)
    (store.path / "recipe.json").write_text(newer.to_json())
    with pytest.raises(StoreError, match=f"format is {FORMAT + 1}, this version reads {FORMAT}"):
        Store.open(store.path)
    with pytest.raises(StoreError, match=f"recipe.format is {FORMAT + 1}"):
        Store.create(tmp_path / "other", newer)
    with pytest.raises(StoreError, match="storage is 'zip'"):
        Store.create(tmp_path / "other", dataclasses.replace(recipe, storage="zip"))


def test_segments_are_named_by_their_keys_and_found_again(store, make_keys):
    units = [make_keys(4, seed) for seed in range(5)]
    infos = [store.write_segment(keys, {"state.x": np.full((4, 2), i)}) for i, keys in enumerate(units)]
    assert store.segments() == sorted(segment_id(keys) for keys in units)
    assert [info.id for info in infos] == [segment_id(keys) for keys in units]
    everything = np.concatenate(units)
    assert sorted(map(bytes, store.keys())) == sorted(map(bytes, everything))
    shuffled = everything[np.random.default_rng(0).permutation(20)]
    rows = store.rows(shuffled)
    found = [(rows.segments[segment], row) for segment, row in zip(rows.segment, rows.row, strict=True)]
    places = {bytes(key): (segment_id(keys), row) for keys in units for row, key in enumerate(keys)}
    assert found == [places[bytes(key)] for key in shuffled]


def test_keys_with_zero_bytes_are_not_confused(store):
    keys = np.zeros((34, 16), np.uint8)
    keys[np.arange(1, 17), np.arange(16)] = 1
    keys[np.arange(17, 33), np.arange(16)] = 255
    keys[33] = 1
    store.write_segment(keys, {})
    assert store.rows(keys).row.tolist() == list(range(34))
    other = keys.copy()
    other[:, 15] ^= 2
    assert store.missing(other).all()


def test_missing_keys_are_named_up_to_five(store, make_keys):
    keys = make_keys(12)
    assert store.missing(keys).all()
    store.write_segment(keys[:4], {})
    assert store.missing(keys).tolist() == [False] * 4 + [True] * 8
    with pytest.raises(MissingKeysError) as error:
        store.rows(keys)
    message = str(error.value)
    assert "8 of 12 samples" in message
    assert [key.tobytes().hex() in message for key in keys] == [False] * 4 + [True] * 5 + [False] * 3
    assert len(store.rows(keys[:0])) == 0


def test_other_writers_are_seen_after_refresh(store, make_keys):
    keys = make_keys(2)
    assert store.missing(keys).all()
    Store.open(store.path).write_segment(keys, {})
    store.refresh()
    assert not store.missing(keys).any()


def test_writing_again_changes_nothing(store, make_keys, fingerprint):
    tensors = {"state.x": np.ones((3, 2), np.float32), "input.ids": [np.arange(n) for n in (1, 0, 4)]}
    first = store.write_segment(make_keys(3), tensors)
    before = fingerprint(store.path)
    modified = [path.stat().st_mtime_ns for path in store.path.rglob("*")]
    assert store.write_segment(make_keys(3), tensors) == first
    assert fingerprint(store.path) == before
    assert [path.stat().st_mtime_ns for path in store.path.rglob("*")] == modified


def test_two_stores_of_the_same_data_are_the_same_bytes(tmp_path, recipe, make_keys, fingerprint):
    tensors = {"state.b": torch.randn(3, 2), "state.a": [torch.randn(n, 2) for n in (1, 3, 2)]}
    for name, order in (("one", ["state.a", "state.b"]), ("two", ["state.b", "state.a"])):
        Store.create(tmp_path / name, recipe).write_segment(make_keys(3), {key: tensors[key] for key in order})
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def test_any_zarr_tool_opens_a_segment(store, make_keys):
    keys = make_keys(3)
    values = {
        "state.x": np.arange(24, dtype=np.float32).reshape(3, 2, 4),
        "state.nothing": np.zeros((3, 0), np.float32),
        "input.mask": np.array([True, False, True]),
    }
    ragged = [np.full((n, 2), n, np.float32) for n in (2, 0, 1)]
    info = store.write_segment(keys, {**values, "state.tokens": ragged})
    group = zarr.open_group(store.path / info.id, mode="r", zarr_format=3)
    assert group.attrs["samples"] == 3
    assert sorted(group.array_keys()) == [
        "input.mask",
        "keys",
        "state.nothing",
        "state.tokens",
        "state.tokens.offsets",
        "state.x",
        "sums",
    ]
    assert (group["keys"][...] == keys).all()
    for name, expected in values.items():
        assert group[name][...].tolist() == expected.tolist()
    assert group["state.tokens"][...].tolist() == np.concatenate(ragged).tolist()
    assert group["state.tokens.offsets"][...].tolist() == [0, 2, 2, 3]
    assert info.bytes == sum(path.stat().st_size for path in (store.path / info.id).rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "state.",
        "state./etc",
        "state.a/b",
        "../state.x",
        "state.x.offsets",
        "input.a b",
        "keys",
        "state.\n",
        "state.é",
    ],
)
def test_names_that_could_leave_the_folder_are_refused(store, make_keys, name):
    with pytest.raises(StoreError, match="tensor name"):
        store.write_segment(make_keys(2), {name: np.zeros((2, 1))})
    assert store.segments() == []


@pytest.mark.parametrize("keys", [np.zeros((0, 16), np.uint8), np.zeros((2, 15), np.uint8), np.zeros((2, 16), np.int8)])
def test_keys_of_another_shape_are_refused(store, keys):
    with pytest.raises(StoreError, match="keys are"):
        store.write_segment(keys, {})


def test_a_failed_write_leaves_nothing(store, make_keys, fingerprint):
    before = fingerprint(store.path)
    with pytest.raises(StoreError, match=r"state.y has 3 samples, the unit has 2 keys"):
        store.write_segment(make_keys(2), {"state.x": np.zeros((2, 9)), "state.y": np.zeros((3, 1))})
    assert fingerprint(store.path) == before


def test_a_full_disk_leaves_nothing_and_the_next_run_goes_on(store, make_keys, fingerprint):
    before = fingerprint(store.path)
    tensors = {"state.x": np.zeros((2, 100_000))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot be written .* make room"):
            store.write_segment(make_keys(2), tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fingerprint(store.path) == before
    store.write_segment(make_keys(2), tensors)
    assert verify(store) == []


def test_a_segment_without_its_group_metadata_does_not_exist_and_is_replaced(store, make_keys, fingerprint):
    tensors = {"state.x": np.ones((2, 3))}
    info = store.write_segment(make_keys(2), tensors)
    whole = fingerprint(store.path)
    (store.path / info.id / "zarr.json").unlink()
    (store.path / info.id / "state.x" / "c.0.0").write_bytes(b"half")
    store.refresh()
    assert store.segments() == []
    assert store.missing(make_keys(2)).all()
    store.write_segment(make_keys(2), tensors)
    assert fingerprint(store.path) == whole


def test_permissions_follow_the_umask(store, make_keys):
    mask = os.umask(0o022)
    try:
        info = store.write_segment(make_keys(1), {"state.x": np.ones((1, 1))})
    finally:
        os.umask(mask)
    assert (store.path / info.id).stat().st_mode & 0o777 == 0o755


def test_a_unit_committed_meanwhile_is_missing_whole_until_the_store_looks_again(store, make_keys):
    """Else its bad sample alone would drop out of the plan of an encoder beside, and shift all units after it."""
    keys = make_keys(3)
    assert store.missing(keys).all()
    Store.open(store.path).write_segment(keys[:2], {"state.x": np.ones((2, 1))}, keys[2:])
    assert store.missing(keys).all()
    assert len(store.set_aside()) == 0
    store.refresh()
    assert store.missing(keys).tolist() == [False, False, True]
    assert store.set_aside().tolist() == keys[2:].tolist()
