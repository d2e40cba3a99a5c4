"""The plan of an encode: which rows become one segment, and what is no row number."""

import numpy as np
import pytest

from pipeline.encode.unit import check_rows, plan
from pipeline.keys import Recipe
from pipeline.store import FORMAT, Store


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store", Recipe(FORMAT, "", "", "", {}, None, "float32", "raw:float16"))


def keys_of(count):
    return np.arange(count * 16, dtype=np.uint8).reshape(count, 16)


def test_rows_of_one_group_lie_together(store):
    groups = np.array([0, 1, 0, 1, 1, 0, 2])
    units = plan(keys_of(7), [np.arange(7)], [[store]], 2, groups)
    assert [unit.rows.tolist() for unit in units] == [[0, 2], [1, 3], [4], [5], [6]]


def test_without_groups_rows_are_taken_in_order(store):
    units = plan(keys_of(7), [np.array([1, 2, 3, 5, 6])], [[store]], 2)
    assert [unit.rows.tolist() for unit in units] == [[1, 2], [3, 5], [6]]
    assert [unit.stores for unit in units] == [((0, 0),)] * 3


def test_views_may_want_different_rows(store, tmp_path):
    other = Store.create(tmp_path / "other", store.recipe)
    units = plan(keys_of(4), [np.array([0, 1]), np.array([1, 2])], [[store], [other]], 8)
    assert [(unit.rows.tolist(), unit.stores) for unit in units] == [([0, 1], ((0, 0),)), ([1, 2], ((1, 0),))]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([[np.arange(3)]], "list"),
        ([np.arange(3)[None]], "2 axes of int64"),
        ([np.array([True, False, True])], "1 axes of bool"),
        (np.arange(3), "int64"),
        ([np.arange(3.0)], "1 axes of float64"),
    ],
)
def test_anything_else_than_row_numbers_is_refused_at_once(store, wanted, found):
    with pytest.raises(
        TypeError, match=rf"wanted\[0\] is {found}; give the row numbers of this view, one array \(n,\)"
    ):
        plan(keys_of(3), wanted, [[store]], 2)
    with pytest.raises(TypeError):
        check_rows(wanted)
