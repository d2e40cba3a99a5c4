"""Searching sorted keys gives what a dictionary gives, for digests and for keys that share any half."""

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import KeySet, first_rows
from pipeline.store.local import index as module


def draw(kind: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (n, 16), dtype=np.uint8)
    if kind == "one beginning":
        keys[:, :8] = 7
        keys[:, 8:15] = 0
    elif kind == "few beginnings":
        keys[:, :8] = 0
        keys[:, 7] %= 3
        keys[:, 0] = rng.choice([0, 127, 128, 255], n)
        keys[:, 8:] = rng.choice([0, 255], (n, 8))
    elif kind == "one end":
        keys[:, 8:] = 255
        keys[:, :7] = 0
    elif kind == "repeated":
        keys = keys[rng.integers(0, n // 3, n)]
    return keys


KINDS = ["digests", "one beginning", "few beginnings", "one end", "repeated"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_find_is_what_a_dictionary_finds(kind):
    keys, others = draw(kind, 500, 0), draw(kind, 500, 1)
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key.tobytes(), row)
    found = KeySet(keys)
    wanted = np.concatenate([keys[::-1], others])
    expected = [first.get(key.tobytes(), -1) for key in wanted]
    assert found.find(wanted).tolist() == expected
    assert found.contains(wanted).tolist() == [row >= 0 for row in expected]
    assert (found.keys() == keys).all()
    assert first_rows(keys).tolist() == sorted(first.values())


def test_an_empty_set_holds_nothing():
    keys = draw("digests", 3, 0)
    assert not KeySet(keys[:0]).contains(keys).any()
    assert KeySet(keys).find(keys[:0]).tolist() == []
    assert first_rows(keys[:0]).tolist() == []


@pytest.mark.parametrize("keys", [np.zeros((2, 15), np.uint8), np.zeros((2, 16), np.int8), np.zeros(16, np.uint8)])
def test_keys_of_another_shape_are_refused(keys):
    with pytest.raises(StoreError, match=r"expected uint8 of shape \(n, 16\)"):
        KeySet(keys)
    with pytest.raises(StoreError, match="keys are"):
        KeySet(draw("digests", 2, 0)).find(keys)
