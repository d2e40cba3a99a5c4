"""Digests separate what differs and join what is equal; a recipe names its first difference."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from pipeline.keys import ABSENT, KEY_BYTES, Recipe, content_key, digest, tensors_digest

RECIPE = Recipe(
    format=1,
    weights="aa",
    architecture="bb",
    cut="layer3",
    preprocessing={"image_size": 224, "mean": [0.5, 0.5], "crop": {"ratio": 0.875}},
    view=None,
    compute_dtype="float32",
    storage="raw:float16",
)

DISTINCT = [
    "a",
    b"a",
    np.array([97], np.uint8),
    np.array([97], np.int8),
    np.array([[97]], np.uint8),
    np.array(97, np.uint8),
    97,
    97.0,
    "97",
    True,
    1,
    None,
    ["a"],
    [["a"]],
    ["a", ""],
    ["", "a"],
    ["ab"],
    ["a", "b"],
    {"a": "b"},
    {"a": b"b"},
    {},
    [],
    "",
    b"",
    np.zeros((0, 2), np.float32),
    np.zeros((2, 0), np.float32),
]


def test_digest_ignores_key_order_and_nothing_else():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    values = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {}]
    assert len({digest(value) for value in values}) == len(values)


def test_digest_is_stable_across_releases():
    assert digest({"cut": "layer3", "view": None}) == "a1c14e281f545aa3b948944775af0621"


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_digest_refuses_numbers_json_does_not_have(value):
    with pytest.raises(ValueError, match="JSON"):
        digest(value)


@pytest.mark.parametrize("value", [{1: 2}, [{"a": {None: 1}}], {"a": object()}, {"a": {1, 2}}])
def test_digest_refuses_what_json_would_bend(value):
    with pytest.raises(TypeError):
        digest(value)


def test_content_keys_are_distinct_and_of_fixed_length():
    keys = [content_key(content) for content in DISTINCT]
    assert {len(key) for key in keys} == {KEY_BYTES}
    equal = [(DISTINCT[i], DISTINCT[j]) for i, j in itertools.combinations(range(len(keys)), 2) if keys[i] == keys[j]]
    assert equal == []


def test_content_key_ignores_layout_and_byte_order():
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    key = content_key(array)
    assert content_key(np.asfortranarray(array)) == key
    assert content_key(array.astype(">i4")) == key
    assert content_key(np.repeat(array, 2, axis=1)[:, ::2]) == key
    assert content_key({"x": 1, "y": 2}) == content_key({"y": 2, "x": 1})


def test_content_key_takes_lone_surrogates():
    assert content_key("\ud800") != content_key("\ud801")


@pytest.mark.parametrize("content", [object(), [object()], np.array(["a"]), np.array([object()]), {1, 2}])
def test_content_key_names_a_type_it_cannot_take(content):
    with pytest.raises(TypeError, match="has no content key"):
        content_key(content)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
)
def test_tensors_digest_sees_one_changed_value(dtype):
    tensors = {"a": torch.zeros(3, 2).to(dtype), "b": torch.zeros(()).to(dtype)}
    before = tensors_digest(tensors)
    assert tensors_digest(dict(reversed(tensors.items()))) == before
    tensors["a"][2, 1] = 1
    assert tensors_digest(tensors) != before


def test_tensors_digest_depends_on_names_dtypes_and_shapes_but_not_on_strides():
    base = torch.arange(6.0).reshape(2, 3)
    same = tensors_digest({"w": base})
    assert tensors_digest({"w": base.t().contiguous().t()}) == same
    others = [{"v": base}, {"w": base.reshape(3, 2)}, {"w": base.double()}, {"w": base.view(torch.int32)}, {}]
    assert same not in {tensors_digest(tensors) for tensors in others}


def test_tensors_digest_refuses_weights_that_were_never_loaded():
    with pytest.raises(ValueError, match="'w' is on the meta device"):
        tensors_digest({"w": torch.zeros(2, device="meta")})


def test_recipe_survives_json_and_equals_itself():
    again = Recipe.from_json(RECIPE.to_json())
    assert again == RECIPE
    assert hash(again) == hash(RECIPE)
    assert again.first_difference(RECIPE) is None
    assert again.to_json() == RECIPE.to_json()


def test_recipe_holds_a_copy_in_json_types():
    preprocessing = {"mean": (0.5, 0.5)}
    recipe = dataclasses.replace(RECIPE, preprocessing=preprocessing)
    preprocessing["mean"] = (1.0, 1.0)
    assert recipe.preprocessing == {"mean": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"cut": "layer2"}, ("cut", "layer3", "layer2")),
        ({"format": 2, "cut": "layer2"}, ("format", 1, 2)),
        ({"view": "flip"}, ("view", None, "flip")),
        (
            {"preprocessing": {**RECIPE.preprocessing, "image_size": 256}},
            ("preprocessing.image_size", 224, 256),
        ),
        (
            {"preprocessing": {**RECIPE.preprocessing, "crop": {"ratio": 1}}},
            ("preprocessing.crop.ratio", 0.875, 1),
        ),
        (
            {"preprocessing": {**RECIPE.preprocessing, "std": [1.0]}},
            ("preprocessing.std", ABSENT, [1.0]),
        ),
    ],
)
def test_recipe_names_the_first_difference(changes, difference):
    other = dataclasses.replace(RECIPE, **changes)
    assert other != RECIPE
    assert RECIPE.first_difference(other) == difference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": 3}, "'cut' is 3"),
        ({"format": True}, "'format' is True"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"preprocessing": []}, "'preprocessing' is"),
    ],
)
def test_recipe_refuses_json_that_is_no_recipe(change, message):
    raw = json.loads(RECIPE.to_json()) | change
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"format": NaN}'])
def test_recipe_refuses_text_that_is_no_recipe(text):
    with pytest.raises(ValueError):
        Recipe.from_json(text)
