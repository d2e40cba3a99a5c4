"""Stores in a bucket: the same bytes as on a disk, read through a segment cache, whatever a server does meanwhile."""

import dataclasses
import os
import threading
import time

import numpy as np
import pytest
import torch
import zarr
from obstore.store import from_url
from services.faulty import KINDS
from zarr.storage import ObjectStore

from pipeline.errors import ConfigError, CorruptStoreError, StaleStoreError, StoreError
from pipeline.store import (
    Bucket,
    ReadAhead,
    Reader,
    Remote,
    Resident,
    SegmentCache,
    Store,
    describe,
    format_facts,
    verify,
)
from pipeline.store.remote.bucket import RetryPolicy

pytestmark = pytest.mark.slow

HASTY = RetryPolicy(retries=1, stalled=1.0, pauses=(0.01, 0.01, 0.01))
SAMPLES = 5


def tensors(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "state.x": draw.standard_normal((SAMPLES, 30, 20)).astype(np.float32),
        "state.r": [draw.standard_normal((m % 4, 2)).astype(np.float32) for m in range(SAMPLES)],
        "input.ids": draw.integers(0, 9, (SAMPLES, 4)),
    }


@pytest.fixture(params=["s3", "file"])
def place(request, tmp_path):
    """The URL of an empty place."""
    if request.param == "file":
        return f"file://{tmp_path / 'elsewhere'}/stores"
    return f"{request.getfixturevalue('bucket').url}/some/stores"


@pytest.fixture
def filled(place, tmp_path, recipe, make_keys):
    """Four segments there and in a local store; the one that lies there is opened anew, in another mirror."""
    return fill(place, tmp_path, recipe, make_keys)


def fill(place, folder, recipe, make_keys):
    first = Remote(Bucket(place), folder / "first")
    there, local = Store.create(first.mirror / "0.5", recipe, first), Store.create(folder / "local", recipe)
    for seed in range(4):
        for store in (there, local):
            store.write_segment(make_keys(SAMPLES, seed), tensors(seed), make_keys(1, 9))
    remote = Remote(Bucket(place, policy=HASTY), folder / "mirror")
    return Store.open(remote.mirror / "0.5", recipe, remote), local


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cache_nbytes(cache):
    return sum(path.stat().st_size for path in cache.root.rglob("*") if path.is_file())


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def gathered_alike(reader, there, local, batch=3):
    """Whether every batch is what the local store gives, and the largest number of bytes in the cache meanwhile."""
    keys, expected = local.keys(), Reader(local.path)
    for begin in range(0, len(keys), batch):
        part = keys[begin : begin + batch]
        if not same(reader.gather(there.rows(part)), expected.gather(local.rows(part))):
            return False
    return True


def test_the_objects_are_the_files_of_a_local_store(filled):
    there, local = filled
    objects = there.remote.objects
    listed = {path: listed.size for path, listed in objects.list("")}
    assert {path: objects.read(path) for path in listed} == {
        f"0.5/{name}": data for name, data in files(local.path).items()
    }
    assert listed == {f"0.5/{name}": len(data) for name, data in files(local.path).items()}
    assert there.segments() == local.segments()
    assert there.nbytes() == local.nbytes()
    assert np.array_equal(there.keys(), local.keys())
    assert np.array_equal(there.set_aside(), local.set_aside())
    for root in (there.path, there.path.parents[1] / "first"):
        assert not list(root.rglob("state.x/c.*")), "no large file stays in a mirror"


def test_a_listing_comes_page_by_page(filled, monkeypatch):
    there, local = filled
    monkeypatch.setattr("pipeline.store.remote.bucket.LISTED_AT_ONCE", 3)
    assert sorted(path for path, _ in there.remote.objects.list("0.5")) == [
        f"0.5/{name}" for name in sorted(files(local.path))
    ]
    assert list(there.remote.objects.list("nothing")) == []


def test_zarr_tools_read_a_segment_there(bucket, tmp_path, recipe, make_keys):
    there, local = fill(f"{bucket.url}/some/stores", tmp_path, recipe, make_keys)
    segment = there.segments()[0]
    group = zarr.open_group(ObjectStore(from_url(f"{bucket.url}/some/stores/0.5/{segment}"), read_only=True), mode="r")
    expected = zarr.open_group(local.path / segment, mode="r")
    assert sorted(group.array_keys()) == sorted(expected.array_keys())
    assert np.array_equal(group["state.x"][...], expected["state.x"][...])


@pytest.mark.parametrize("storage", ["raw:float16", "zstd:float16", "int8:float16"])
def test_batches_are_those_of_a_local_store_within_a_budget(place, tmp_path, recipe, make_keys, storage):
    there, local = fill(place, tmp_path, dataclasses.replace(recipe, storage=storage), make_keys)
    reader = Reader(there.path, cache=SegmentCache(tmp_path / "cache", 13_000), remote=there.remote)
    assert np.array_equal(reader.sizes(there.rows(local.keys())), Reader(local.path).sizes(local.rows(local.keys())))
    assert not (tmp_path / "cache").exists(), "sizes need no values"
    assert gathered_alike(reader, there, local)
    assert 0 < cache_nbytes(SegmentCache(tmp_path / "cache")) <= 13_000
    rows, expected = there.rows(local.keys()), Reader(local.path).gather(local.rows(local.keys()))
    assert same(Resident(reader, rows, torch.device("cpu")).gather(rows), expected)
    assert verify(there) == []
    assert f"{SAMPLES * 4} samples" in next(format_facts(describe(there)))


def test_a_segment_without_its_own_metadata_does_not_exist_and_is_written_again(place, tmp_path, recipe, make_keys):
    remote = Remote(Bucket(place), tmp_path / "mirror")
    store = Store.create(remote.mirror / "0.5", recipe, remote)
    whole = remote.objects.put

    def killed(path, file, *, anew=False):
        if anew:
            raise KeyboardInterrupt
        return whole(path, file, anew=anew)

    remote.objects.put = killed
    with pytest.raises(KeyboardInterrupt):
        store.write_segment(make_keys(SAMPLES), tensors())
    remote.objects.put = whole
    left = dict(remote.objects.list(""))
    assert len(left) > 5
    assert not any(path.count("/") == 2 and path.endswith("zarr.json") for path in left)
    again = Store.create(remote.mirror / "0.5", recipe, remote)
    assert again.segments() == []
    again.write_segment(make_keys(SAMPLES), tensors())
    assert dict(remote.objects.list("")).keys() > left.keys()
    assert verify(again) == []


def test_a_unit_that_is_there_is_not_written_again(place, tmp_path, recipe, make_keys):
    stores = []
    for name in ("one", "other"):
        remote = Remote(Bucket(place), tmp_path / name)
        stores.append(Store.create(remote.mirror / "0.5", recipe, remote))
    stores[0].write_segment(make_keys(SAMPLES), tensors())
    before = dict(stores[0].remote.objects.list(""))
    stores[1].remote.objects.put = None
    stores[1].write_segment(make_keys(SAMPLES), tensors())
    assert dict(stores[0].remote.objects.list("")) == before
    assert stores[1].holds(make_keys(SAMPLES))
    assert np.array_equal(stores[1].keys(), make_keys(SAMPLES))


def test_what_others_do_there_is_seen(filled, make_keys, tmp_path, recipe):
    there, _ = filled
    assert len(there.segments()) == 4
    other = Remote(there.remote.objects, tmp_path / "theirs")
    theirs = Store.create(other.mirror / "0.5", recipe, other)
    info = theirs.write_segment(make_keys(3, 7), {"state.x": np.ones((3, 2), np.float32)})
    assert len(there.segments()) == 4
    there.refresh()
    assert info.id in there.segments()
    assert len(there.keys()) == 23


def test_a_store_of_another_recipe_is_refused(filled, recipe):
    there, _ = filled
    with pytest.raises(StaleStoreError, match=r"://.*/0.5 was encoded with cut = 'layer3', expected 'layer4'"):
        Store.open(there.path, dataclasses.replace(recipe, cut="layer4"), there.remote)
    with pytest.raises(StoreError, match="no store is here; encode first"):
        Store.open(there.remote.mirror / "0.75", recipe, there.remote)


def test_a_segment_that_exceeds_the_budget_is_refused(filled, tmp_path):
    there, local = filled
    reader = Reader(there.path, cache=SegmentCache(tmp_path / "cache", 1000), remote=there.remote)
    with pytest.raises(StoreError, match=r"bytes of scratch, which may hold 1000; raise train\.scratch_gb"):
        reader.gather(there.rows(local.keys()[:1]))


def test_segments_come_ahead_within_the_room_and_once(filled, tmp_path):
    there, _ = filled
    fetched, names = [], there.segments()
    reader = Reader(there.path, cache=SegmentCache(tmp_path / "cache", 14_000), remote=there.remote)
    prefetch = reader.prefetch
    reader.prefetch = lambda segment: (fetched.append(segment), prefetch(segment))
    batches = [names[:2], names[:2], names[1:3], names[2:], names[3:]]
    with ReadAhead(reader, batches, room=14_000) as ahead:
        ahead.wait(0)
        assert wait_for(lambda: fetched == names[:2])
        ahead.wait(1)
        ahead.wait(2)
        assert wait_for(lambda: fetched == names[:3]), "the first one is read for the last time, and makes room"
        ahead.wait(3)
        ahead.wait(4)
    assert fetched == names
    assert cache_nbytes(SegmentCache(tmp_path / "cache")) <= 14_000


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_threads_share_a_cache(filled, tmp_path):
    there, local = filled
    cache, wrong = SegmentCache(tmp_path / "cache", 13_000), []

    def read():
        reader = Reader(there.path, cache=cache, remote=there.remote)
        wrong.extend(turn for turn in range(3) if not gathered_alike(reader, there, local))

    there.keys()
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache_nbytes(cache) <= 13_000


@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_pass_change_nothing(bucket, proxy, tmp_path, recipe, make_keys, kind):
    _, local = fill(f"{bucket.url}/stores", tmp_path, recipe, make_keys)
    os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint  # monkeypatch of `bucket` sets it back
    remote = Remote(Bucket(f"{bucket.url}/stores", policy=HASTY), tmp_path / "through")
    store = Store.open(remote.mirror / "0.5", recipe, remote)
    store.keys()
    proxy.fail(kind, "state.x/c.", times=2)
    reader = Reader(store.path, cache=SegmentCache(tmp_path / "cache"), remote=remote, check=False)
    assert gathered_alike(reader, store, local)
    assert proxy.failed == 2


@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_stay_are_one_clear_line(bucket, proxy, tmp_path, recipe, make_keys, kind):
    fill(f"{bucket.url}/stores", tmp_path, recipe, make_keys)
    os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
    remote = Remote(Bucket(f"{bucket.url}/stores", policy=HASTY), tmp_path / "through")
    store = Store.open(remote.mirror / "0.5", recipe, remote)
    rows = store.rows(store.keys())
    proxy.fail(kind, "state.x/c.")
    reader = Reader(store.path, cache=SegmentCache(tmp_path / "cache"), remote=remote, check=False)
    expected = CorruptStoreError if kind == "flipped" else StoreError
    with pytest.raises(expected, match=r"^s3://\S+/stores/0.5/\S+/state.x/c") as caught:
        reader.gather(rows[:1])
    assert "\n" not in str(caught.value)
    assert proxy.failed >= 3
    assert not list((tmp_path / "cache").rglob("state.x")), "nothing half is left"


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_faults_while_writing(bucket, proxy, tmp_path, recipe, make_keys, kind):
    os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
    remote = Remote(Bucket(f"{bucket.url}/stores", policy=HASTY), tmp_path / "mirror")
    store = Store.create(remote.mirror / "0.5", recipe, remote)
    proxy.fail(kind, "/c.", times=3, methods=("PUT",))
    store.write_segment(make_keys(SAMPLES), tensors())
    assert proxy.failed == 3
    assert verify(store) == []
    proxy.fail(kind, "state.x/c.", methods=("PUT",))
    with pytest.raises(StoreError, match=r"^s3://\S+/state.x/c"):
        store.write_segment(make_keys(SAMPLES, 1), tensors(1))
    assert len(Store.open(store.path, recipe, remote).segments()) == 1


def told(action):
    with pytest.raises((StoreError, ConfigError)) as caught:
        action()
    said = str(caught.value)
    assert "\n" not in said
    for secret in ("a-secret-of-the-tests", "wrong-secret", "recycler"):
        assert secret not in said
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "no traceback repeats it"
    return said


def test_what_to_set_is_said(bucket, tmp_path, recipe, monkeypatch):
    def create(url=bucket.url):
        remote = Remote(Bucket(url, policy=HASTY), tmp_path / "mirror")
        return Store.create(remote.mirror / "0.5", recipe, remote)

    assert "there is no such bucket" in told(lambda: create("s3://no-such-bucket/x"))
    with monkeypatch.context() as other:
        other.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        assert "SignatureDoesNotMatch); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in told(create)
    with monkeypatch.context() as other:
        other.setenv("AWS_ACCESS_KEY_ID", "somebody")
        assert "access is denied" in told(create)
    with monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert "cannot be reached" in told(create)
        assert "AWS_ENDPOINT_URL" in told(create)


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("ftp://host/x", {}, "expected a URL that begins with s3://, gs://, az://, file://"),
        ("s3://", {}, "and a bucket"),
        ("data/activations", {}, "is no place for stores"),
        ("s3://me:wrong-secret@bucket/x", {}, "leave them out"),
        ("az://container/x?sig=wrong-secret", {}, "leave them out"),
        ("s3://bucket/x", {"secret_access_key": "wrong-secret"}, "secret_access_key may be secret"),
        ("s3://bucket/x", {"endpiont": "http://host"}, "'endpiont' is not valid"),
    ],
)
def test_places_and_options_that_cannot_be_used(url, options, said):
    assert said in told(lambda: Bucket(url, options))
