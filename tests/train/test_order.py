"""The order of an epoch: a permutation, pure; how several processes share out a batch."""

import itertools

import numpy as np
import pytest

from pipeline.train.order import Window, batches, shares, views

SIZES = [(n, size) for n in (0, 1, 2, 7, 16, 33) for size in (1, 3, 8)]


@pytest.mark.parametrize(("n", "size"), SIZES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_unit_comes_once(n, size, shuffle):
    found = batches(np.arange(n), size, seed=3, epoch=1, shuffle=shuffle)
    assert all(0 < len(batch) <= size for batch in found)
    assert sorted(np.concatenate(found or [np.array([], int)])) == list(range(n))


@pytest.mark.parametrize(("n", "size"), [*SIZES, (17, 16), (17, 8), (18, 16)])
@pytest.mark.parametrize("least", [2, 4])
@pytest.mark.parametrize("lengths", [None, "given"])
def test_a_last_batch_that_is_too_small_joins_the_one_before(n, size, least, lengths):
    lengths = None if lengths is None else np.arange(n) % 5
    given = {"seed": 3, "epoch": 1, "shuffle": True, "lengths": lengths}
    plain, found = (batches(np.arange(n), size, least=of, **given) for of in (1, least))
    assert np.concatenate([[], *found]).tolist() == np.concatenate([[], *plain]).tolist()
    assert sorted(np.concatenate([[], *found])) == list(range(n))
    joined = len(plain) > 1 and len(plain[-1]) < least
    assert [len(batch) for batch in found[:-1]] == [size] * (len(plain) - 1 - joined)
    assert len(found) == len(plain) - joined
    if size >= least and n >= least:
        assert min(map(len, found)) >= least


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 33])
def test_processes_share_a_batch_evenly_and_none_is_without(count, world):
    found = shares(count, world)
    assert len(found) == world
    sizes = [len(own) for own in found]
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    if count >= world:
        assert np.concatenate(found).tolist() == list(range(count))
    else:
        assert set(np.concatenate(found)) == set(range(count))


def test_of_an_empty_batch_there_is_nothing_to_share():
    assert [own.tolist() for own in shares(0, 2)] == [[], []]


def test_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(batches(np.arange(100), 7, seed=seed, epoch=epoch, shuffle=True)).tolist()

    assert order(0, 0) == order(0, 0)
    orders = {tuple(order(seed, epoch)) for seed, epoch in itertools.product(range(3), range(3))}
    assert len(orders) == 9


def test_without_shuffle_the_order_is_that_of_the_units():
    got = batches(np.array([5, 3, 9]), 2, seed=0, epoch=4, shuffle=False)
    assert [batch.tolist() for batch in got] == [[5, 3], [9]]


@pytest.mark.parametrize(
    "units",
    [
        np.arange(20).reshape(10, 2),
        [np.array([2 * i, 2 * i + 1], np.int32) for i in range(10)],
    ],
)
def test_rows_of_a_unit_stay_together(units):
    for batch in batches(units, 3, seed=1, epoch=0, shuffle=True):
        assert batch.dtype == np.int64
        assert (batch[1::2] == batch[::2] + 1).all()
        assert (batch[::2] % 2 == 0).all()


def test_units_may_have_different_sizes():
    units = [np.arange(start, start + size) for start, size in ((0, 1), (1, 3), (4, 2))]
    got = batches(units, 2, seed=0, epoch=0, shuffle=False)
    assert [batch.tolist() for batch in got] == [[0, 1, 2, 3], [4, 5]]


def test_shuffle_reaches_every_permutation():
    seen = {tuple(np.concatenate(batches(np.arange(4), 4, seed=0, epoch=epoch, shuffle=True))) for epoch in range(400)}
    assert len(seen) == 24


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_window_keeps_reads_within_its_segments(size):
    groups = np.repeat(np.arange(10) * 3, 7)
    window = Window(groups, size)
    order = np.concatenate(batches(np.arange(70), 4, seed=2, epoch=0, shuffle=True, window=window))
    assert sorted(order) == list(range(70))
    per_window = 7 * size
    for start in range(0, 70, per_window):
        assert len(set(groups[order[start : start + per_window]])) <= size
    other = np.concatenate(batches(np.arange(70), 4, seed=2, epoch=1, shuffle=True, window=window))
    assert order.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"epoch": -1}, "epoch is -1"),
        ({"window": Window(np.zeros(5), 0)}, "window.size is 0"),
        ({"window": Window(np.zeros(4), 1)}, "window.groups has 4 entries"),
    ],
)
def test_sizes_out_of_range_are_named(options, message):
    arguments = {"batch_size": 2, "seed": 0, "epoch": 0, "shuffle": True} | options
    with pytest.raises(ValueError, match=message):
        batches(np.arange(5), **arguments)


def test_views_take_turns():
    taken = [views(5, 3, seed=0, epoch=epoch, how="cycle").tolist() for epoch in range(7)]
    assert taken == [[epoch % 3] * 5 for epoch in range(7)]


def test_views_are_drawn_for_each_row_and_epoch_alone():
    """A row's view is a function of seed, epoch and row: neither other calls nor later rows change it."""
    drawn = np.stack([views(2000, 4, seed=1, epoch=epoch, how="random") for epoch in range(3)])
    np.testing.assert_array_equal(views(2000, 4, seed=1, epoch=1, how="random"), drawn[1])
    np.testing.assert_array_equal(views(300, 4, seed=1, epoch=2, how="random"), drawn[2, :300])
    assert (drawn[0] == drawn[1]).mean() < 0.35
    assert (views(2000, 4, seed=2, epoch=0, how="random") == drawn[0]).mean() < 0.35
    counts = np.bincount(drawn[0], minlength=4)
    assert len(counts) == 4
    assert counts.min() > 400


@pytest.mark.parametrize("fault", [{"count": 0}, {"seed": -1}, {"epoch": -1}])
@pytest.mark.parametrize("how", ["cycle", "random"])
def test_views_out_of_range_are_named(fault, how):
    with pytest.raises(ValueError, match=f"{next(iter(fault))} is .*; it must be at least"):
        views(3, **{"count": 2, "seed": 0, "epoch": 0} | fault, how=how)


def test_units_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)

    def waste(found):
        padded = sum(len(batch) * lengths[batch].max() for batch in found)
        return 1 - lengths.sum() / padded

    options = {"seed": 0, "epoch": 0, "shuffle": True}
    bucketed = batches(np.arange(1000), 8, lengths=lengths, **options)
    assert waste(bucketed) < 0.1 < 0.4 < waste(batches(np.arange(1000), 8, **options))
    assert sorted(np.concatenate(bucketed)) == list(range(1000))
    means = [lengths[batch].mean() for batch in bucketed]
    assert np.corrcoef(means, np.arange(len(means)))[0, 1] < 0.5
    again = batches(np.arange(1000), 8, lengths=lengths, **options)
    assert all(np.array_equal(a, b) for a, b in zip(bucketed, again, strict=True))


def test_lengths_need_one_entry_per_unit():
    with pytest.raises(ValueError, match="lengths has 3 entries; it must have one for each of the 4 units"):
        batches(np.arange(4), 2, seed=0, epoch=0, shuffle=True, lengths=np.ones(3))
