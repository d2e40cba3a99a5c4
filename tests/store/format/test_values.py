"""Each tensor is stored in the narrowest allowed dtype that keeps its range."""

import numpy as np
import pytest
import torch

from pipeline.errors import StoreError
from pipeline.store.format.values import encode

HALF_MAX = 65504.0
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("values", "storage", "dtype"),
    [
        (torch.tensor([1.0, -HALF_MAX]), "raw:float16", "float16"),
        (torch.tensor([1.0, 65519.0]), "raw:float16", "float16"),  # rounds to the largest
        (torch.tensor([1.0, 65520.0]), "raw:float16", "bfloat16"),
        (torch.tensor([1.0, -1e5]), "raw:float16", "bfloat16"),
        (torch.tensor([0.0, LOWEST]), "raw:float16", "float32"),  # an attention mask
        (torch.tensor([0.0, LOWEST]), "raw:bfloat16", "float32"),
        (torch.tensor([0.0, -float("inf")]), "raw:float16", "float16"),  # infinite already
        (torch.tensor([float("nan"), 1.0]), "raw:float16", "float16"),
        (torch.tensor([float("nan"), 1e6]), "raw:float16", "bfloat16"),
        (torch.tensor([1.0, 1e5]).bfloat16(), "raw:float16", "bfloat16"),
        (torch.tensor([1.0, 2.0]).bfloat16(), "raw:float16", "float16"),
        (torch.tensor([1.0, 2.0]).half(), "raw:float32", "float32"),
        (torch.tensor([1.0, 2.0]).double(), "raw:float32", "float32"),
        (torch.tensor([1.0, 1e5]), "raw:bfloat16", "bfloat16"),
    ],
)
def test_floats_keep_their_range(values, storage, dtype):
    encoded = encode("state.x", values, 2, storage)
    assert encoded.spec.dtype == dtype
    assert encoded.data.dtype == ("uint16" if dtype == "bfloat16" else dtype)
    bits = torch.from_numpy(encoded.data)
    decoded = bits.view(torch.bfloat16) if dtype == "bfloat16" else bits
    assert torch.equal(decoded.isfinite(), values.isfinite())
    torch.testing.assert_close(decoded.double(), values.double(), rtol=2**-8, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "dtype", "stored"),
    [
        (np.array([1, -(2**31)]), "int64", "int32"),
        (np.array([1, 2**31]), "int64", "int64"),
        (np.array([1, 2], np.int32), "int32", "int32"),
        (np.array([1, 2], np.uint8), "uint8", "uint8"),
        (np.array([True, False]), "bool", "bool"),
        (np.array([1, 2], ">i4"), "int32", "int32"),
    ],
)
def test_integers_keep_their_values(values, dtype, stored):
    encoded = encode("input.x", values, 2, "raw:float16")
    assert (encoded.spec.dtype, encoded.spec.stored, encoded.data.dtype) == (dtype, stored, stored)
    assert encoded.data.tolist() == values.tolist()


def test_values_beyond_every_range_are_refused():
    with pytest.raises(StoreError, match=r"state.x has finite values up to 1e\+300"):
        encode("state.x", np.array([1e300, 0]), 2, "raw:float16")


@pytest.mark.parametrize(
    "values",
    [np.zeros(2, complex), np.array(["a", "b"]), torch.zeros(2, dtype=torch.complex64), np.zeros(2, np.uint32)],
)
def test_other_dtypes_are_named(values):
    with pytest.raises(StoreError, match=r"state.x has dtype \S+; floats"):
        encode("state.x", values, 2, "raw:float16")


@pytest.mark.parametrize(
    ("shapes", "axis", "stored_shape"),
    [
        ([(3, 2), (3, 2)], None, (2, 3, 2)),
        ([(3, 2), (0, 2)], 0, (3, 2)),
        ([(2, 3), (2, 5)], 1, (8, 2)),
        ([(), ()], None, (2,)),
        ([(4,), (1,)], 0, (5,)),
    ],
)
def test_one_ragged_axis_is_laid_end_to_end(shapes, axis, stored_shape):
    samples = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
    encoded = encode("state.x", samples, 2, "raw:float32")
    assert encoded.spec.axis == axis
    assert encoded.data.shape == stored_shape
    if axis is not None:
        assert encoded.offsets.tolist() == np.cumsum([0, *(shape[axis] for shape in shapes)]).tolist()
        for i, sample in enumerate(samples):
            part = encoded.data[encoded.offsets[i] : encoded.offsets[i + 1]]
            assert np.array_equal(np.moveaxis(part, 0, axis), sample)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([np.zeros((2, 3)), np.zeros((4, 5))], r"axes \[0, 1\]"),
        ([np.zeros(2), np.zeros((2, 2))], "numbers of axes"),
        ([np.zeros(2), np.zeros(2, np.float32)], "different dtypes"),
        ([np.zeros(2)], "has 1 samples, the unit has 2"),
        ([], "has 0 samples"),
        (np.array(1.0), "has no axes"),
    ],
)
def test_what_has_no_layout_is_refused(values, message):
    with pytest.raises(StoreError, match=message):
        encode("state.x", values, 2, "raw:float16")


def test_memory_that_may_not_be_written_is_taken_as_it_is():
    values = np.arange(4.0)
    values.flags.writeable = False
    assert encode("state.x", values, 4, "raw:float32").data.tolist() == [0, 1, 2, 3]
