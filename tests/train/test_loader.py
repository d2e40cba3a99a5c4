"""Batches bring states, inputs, targets and rows of the same samples, once an epoch, in memory of their own."""

import threading

import numpy as np
import pytest
import torch

from pipeline.errors import MissingKeysError, TrainError
from pipeline.keys import Recipe
from pipeline.store import FORMAT, Reader, Resident, Store
from pipeline.tasks import Ragged
from pipeline.train import order
from pipeline.train.loader import Loader, StoredRows, choose_source

N = 50
SEGMENT = 8


@pytest.fixture
def store(tmp_path):
    """Sample i has the state i everywhere, i % 4 tokens of value i + 2**20, and a float input of shape (2, i % 4)."""
    recipe = Recipe(FORMAT, "w", "a", "cut", {}, None, "float32", "raw:float16")
    store = Store.create(tmp_path / "store", recipe)
    keys = all_keys()
    for begin in range(0, N, SEGMENT):
        part = range(begin, min(N, begin + SEGMENT))
        tensors = {
            "state.hidden": np.stack([np.full((3, 2), i, np.float32) for i in part]),
            "input.ids": [np.full(i % 4, i + 2**20) for i in part],
            "shape.pixels": np.array([[2, i % 4] for i in part], np.int32),
        }
        store.write_segment(keys[begin : begin + SEGMENT], tensors)
    return store


def all_keys():
    return np.random.default_rng(0).integers(0, 256, (N, 16), dtype=np.uint8)


def table():
    """A sample table in another order than the store, in which one sample stands twice."""
    samples = np.append(np.random.default_rng(1).permutation(N), 7)
    return samples, all_keys()[samples], {"label": samples * 10, "weight": samples.astype(np.float32)}


def make(store, size=6, **options):
    _, keys, targets = table()

    def batches(epoch):
        return order.batches(np.arange(len(keys)), size, seed=0, epoch=epoch, shuffle=True)

    samples = StoredRows(store.rows(keys), options.pop("source", None) or Reader(store.path))
    return Loader(samples, targets, **{"batches": batches} | options)


def prefetching(loader, count):
    """Return `loader`, which reads so many batches ahead in a thread, as for an accelerator."""
    loader._prefetch = count
    return loader


@pytest.fixture(params=["maps", "prefetched", "resident"])
def loader(request, store):
    if request.param == "resident":
        _, keys, _ = table()
        source = Resident(Reader(store.path), store.rows(keys), torch.device("cpu"))
        return make(store, pad={"ids": -1}, source=source)
    return prefetching(make(store, pad={"ids": -1}), 2 if request.param == "prefetched" else 0)


def test_everything_in_a_batch_is_of_the_same_samples(loader):
    samples, _, _ = table()
    for batch in loader:
        of_rows = torch.from_numpy(samples)[batch.rows]
        assert torch.equal(batch.targets["label"], of_rows * 10)
        assert torch.equal(batch.targets["weight"], of_rows.float())
        assert batch.state["hidden"].shape == (len(of_rows), 3, 2)
        assert (batch.state["hidden"] == of_rows[:, None, None]).all()
        lengths = of_rows % 4
        assert batch.inputs["ids"].dtype == torch.int64
        assert batch.inputs["ids"].shape == (len(of_rows), lengths.max())
        for ids, sample, length in zip(batch.inputs["ids"], of_rows, lengths, strict=True):
            assert ids.tolist() == [sample + 2**20] * length + [-1] * (lengths.max() - length)
        assert batch.inputs["pixels"].shape == (len(of_rows), 2, lengths.max())


def test_an_epoch_has_every_row_once_and_epochs_differ(loader):
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = [batch.rows for batch in loader]
        assert len(batches) == len(loader) == 9
        orders.append(torch.cat(batches).tolist())
        assert sorted(orders[-1]) == list(range(N + 1))
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_a_sample_may_stand_twice_in_a_batch(store):
    batches = [np.array([3, 3, 50, 0, 3])]
    (batch,) = make(store, batches=batches)
    assert sorted(batch.rows.tolist()) == [0, 3, 3, 3, 50]
    samples, _, _ = table()
    assert batch.state["hidden"][:, 0, 0].tolist() == samples[batch.rows].tolist()


def test_batches_may_be_kept_and_changed(store):
    kept = list(make(store))
    values = [batch.state["hidden"].clone() for batch in kept]
    for batch in make(store):
        batch.state["hidden"].fill_(-1)
    assert all(torch.equal(batch.state["hidden"], value) for batch, value in zip(kept, values, strict=True))


def test_pairs_keep_their_targets(store):
    units = np.arange(50).reshape(25, 2)
    targets = {"pair": np.append(np.repeat(np.arange(25), 2), 99), "role": np.append(np.tile([0, 1], 25), 0)}
    _, keys, _ = table()
    for batch in Loader(
        StoredRows(store.rows(keys), Reader(store.path)),
        targets,
        order.batches(units, 4, seed=0, epoch=0, shuffle=True),
    ):
        pairs, roles = batch.targets["pair"], batch.targets["role"]
        assert torch.equal(batch.rows, pairs * 2 + roles)
        assert sorted(pairs[roles == 0].tolist()) == sorted(pairs[roles == 1].tolist())


@pytest.mark.parametrize("resident", [False, True])
def test_extras_and_ragged_targets_are_of_the_same_samples(tmp_path, resident):
    store = Store.create(tmp_path / "store", Recipe(FORMAT, "w", "a", "cut", {}, None, "float32", "raw:float16"))
    keys, lengths = all_keys(), np.arange(N) % 5 + 1
    for begin in range(0, N, SEGMENT):
        part = range(begin, min(N, begin + SEGMENT))
        extras = {"word": [np.full(lengths[i], i) for i in part], "chars": [np.full((lengths[i], 2), i) for i in part]}
        hidden = {"state.hidden": np.zeros((len(part), 2), np.float32)}
        store.write_segment(keys[begin : begin + SEGMENT], hidden | {f"extra.{n}": t for n, t in extras.items()})
    reader = Reader(store.path)
    source = Resident(reader, store.rows(keys), torch.device("cpu")) if resident else reader
    targets = {"tags": Ragged.of([[i] * (i % 3) for i in range(N)])}
    pad = {"extra.word": -1, "extra.chars": -1}
    for batch in Loader(StoredRows(store.rows(keys), source), targets, np.array_split(np.arange(N), 7), pad=pad):
        assert batch.inputs == {}
        assert set(batch.targets) == {"tags", "word", "chars"}
        for at, i in enumerate(batch.rows.tolist()):
            own, filled = lengths[i], lengths[batch.rows].max() - lengths[i]
            assert batch.targets["word"][at].tolist() == [i] * own + [-1] * filled
            assert batch.targets["chars"][at].tolist() == [[i, i]] * own + [[-1, -1]] * filled
            assert [tag for tag in batch.targets["tags"][at].tolist() if tag != -100] == [i] * (i % 3)


def test_stopping_early_leaves_no_thread(store):
    before = threading.active_count()
    for _ in prefetching(make(store), 3):
        break
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_fault_while_reading_is_raised_where_batches_are_asked_for(store, prefetch):
    loader = prefetching(make(store, batches=[np.array([0]), np.array([999])]), prefetch)
    batches = iter(loader)
    next(batches)
    with pytest.raises(IndexError):
        next(batches)


def test_samples_that_were_never_encoded_are_named(store):
    _, keys, targets = table()
    keys[3] = 0
    with pytest.raises(MissingKeysError, match=r"1 of 51 samples were never encoded: 0{32}"):
        Loader(StoredRows(store.rows(keys), Reader(store.path)), targets, [np.array([0])])


@pytest.mark.parametrize(
    ("target", "message"),
    [(np.array(["a"] * 51), "target label has dtype <U1"), (np.arange(50), "target label has 50 entries, .* 51 rows")],
)
def test_targets_that_do_not_fit_are_named(store, target, message):
    _, keys, _ = table()
    with pytest.raises(TrainError, match=message):
        Loader(StoredRows(store.rows(keys), Reader(store.path)), {"label": target}, [np.array([0])])


@pytest.mark.parametrize(
    ("residency", "free", "expected"),
    [("auto", 10**9, Resident), ("auto", 10, Reader), ("host", 10**9, Reader), ("device", 10**9, Resident)],
)
def test_samples_live_on_the_device_when_they_fit(store, monkeypatch, residency, free, expected):
    # The meta device stands for an accelerator: copies to it go through, and keep nothing.
    monkeypatch.setattr("pipeline.train.loader.free_memory", lambda device: free)
    _, keys, _ = table()
    places, reader = store.rows(keys), Reader(store.path)
    assert type(choose_source(places, reader, torch.device("meta"), residency)) is expected
    assert choose_source(places, reader, torch.device("cpu"), residency) is reader


def test_a_device_that_is_too_small_is_named_with_both_sizes(store, monkeypatch):
    monkeypatch.setattr("pipeline.train.loader.free_memory", lambda device: 10)
    _, keys, _ = table()
    with pytest.raises(TrainError, match=r"the samples need .* GB and meta has .* GB free; set it to auto"):
        choose_source(store.rows(keys), Reader(store.path), torch.device("meta"), "device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator here")
@pytest.mark.parametrize("residency", ["device", "host"])
def test_the_same_batches_on_an_accelerator(store, residency):
    device = torch.accelerator.current_accelerator()
    on_host = list(make(store, pad={"ids": -1}))
    places = store.rows(table()[1])
    source = choose_source(places, Reader(store.path), device, residency)
    on_device = list(make(store, pad={"ids": -1}, device=device, source=source))
    for expected, got in zip(on_host, on_device, strict=True):
        assert torch.equal(got.rows, expected.rows)
        for name in ("state", "inputs", "targets"):
            for key, tensor in getattr(expected, name).items():
                moved = getattr(got, name)[key]
                assert moved.device.type == device.type
                assert torch.equal(moved.cpu(), tensor)
