"""Makes the golden stores: `python tests/golden/make_golden.py`, once for each version of the format.

They are kept as they are. `expected.npz` says what they hold, worked out here with numpy alone: for each array of each
segment what is stored (`raw/0/state.x`), for each sample what a reader must give (`raw/0/state.x#2`), bf16 as bits.
"""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import golden_reader
import numpy as np

from pipeline.keys import Recipe
from pipeline.store import FORMAT, Store

HERE = Path(__file__).parent
STORES, EXPECTED = HERE / "stores", HERE / "expected.npz"
CODECS = ("raw", "zstd", "int8", "int8-channel", "int4-group")
LOWEST = float(np.finfo(np.float32).min)

Tensors = Mapping[str, np.ndarray | Sequence[np.ndarray]]


def recipe(codec: str) -> Recipe:
    preprocessing = {"kind": "image", "image_size": 16, "mean": [0.485, 1e-05], "note": "größe"}
    return Recipe(FORMAT, "0" * 32, "1f" * 16, "blocks.2", preprocessing, None, "float32", f"{codec}:float16")


def ramp(*shape: int, start: float = -3.0, step: float = 0.375) -> np.ndarray:
    """Numbers that float16 holds exactly."""
    return (start + step * np.arange(np.prod(shape, dtype=int))).astype(np.float32).reshape(shape)


def keys(first: int, count: int) -> np.ndarray:
    number, place = np.mgrid[first : first + count, :16]
    return np.where(place == 0, number, (number + place) * 37 % 256).astype(np.uint8)


def segments(codec: str) -> list[tuple[np.ndarray, Tensors, np.ndarray | None]]:
    """Return keys, tensors and bad keys of each segment."""

    def others(n: int, big: int) -> dict[str, Any]:
        return {
            "input.ids": (np.arange(n * 4, dtype=np.int64) - 3).reshape(n, 4) * big,
            "input.i16": np.arange(n, dtype=np.int16) - 300,
            "input.i8": np.arange(n, dtype=np.int8) - 100,
            "input.u8": np.arange(n * 2, dtype=np.uint8).reshape(n, 2) + 200,
            "input.mask": (np.arange(n * 3) % 3 == 0).reshape(n, 3),
            "shape.pixels": np.tile(np.array([3, 16, 16], np.int32), (n, 1)),
            "state.none": np.zeros((n, 0, 3), np.float32),
        }

    def rows(lengths: Sequence[int], *shape: int) -> list[np.ndarray]:
        return [ramp(n, *shape, start=n) for n in lengths]

    first = {
        "state.x": ramp(4, 2, 3),
        "state.map": ramp(4, 3, 2, 2),
        "state.r": rows([2, 0, 3, 1], 2),
        "state.t": [np.moveaxis(part, 0, 1) for part in rows([1, 2, 0, 2], 3)],
    }
    second = {
        "state.x": ramp(2, 2, 3, start=70000, step=512),
        "state.map": ramp(2, 3, 2, 2),
        "state.r": ramp(2, 4, 2),
        "state.t": [np.moveaxis(part, 0, 1) for part in rows([3, 1], 3)],
    }
    third = {**second, "state.x": np.where(ramp(2, 2, 3) > 0, LOWEST, ramp(2, 2, 3)).astype(np.float32)}
    whole = [
        (keys(0, 4), first | others(4, 1), None),
        (keys(4, 2), second | others(2, 2**31), keys(40, 3)),
        (keys(6, 2), third | others(2, 1), None),
    ]
    if codec == "zstd":  # chunks of two rows, the last one filled up
        wide = np.zeros((3, 3 << 19), np.float32)
        wide[:, 1 << 19] = [1, 2, 3]
        whole = [(keys(20, 3), {"state.x": wide}, None)] + [(k, {"state.x": t["state.x"]}, b) for k, t, b in whole[:2]]
    return whole


def stored(codec: str, name: str, values: np.ndarray | Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Return the arrays that hold a tensor, and its samples as they are read."""
    if isinstance(values, np.ndarray):
        data, offsets, axis = values, None, 0
    else:
        lengths = np.array([part.shape for part in values])
        axis = int(np.flatnonzero((lengths != lengths[0]).any(0))[0])
        data = np.concatenate([np.moveaxis(part, axis, 0) for part in values])
        offsets = np.concatenate([[0], np.cumsum(lengths[:, axis])])
    arrays = {} if offsets is None else {f"{name}.offsets": offsets}
    packed = codec == "int4-group" and name.startswith("state.") and np.abs(data).max(initial=0) < 1e30
    if packed:
        arrays[name] = grouped(data)
        read = narrowed(data, golden_reader.unpacked(arrays[name], codec, data.shape[1:]))
    elif codec.startswith("int8") and name.startswith("state."):
        whole, scales = quantised(data, per_channel=codec == "int8-channel", ragged=offsets is not None)
        arrays |= {name: whole, f"{name}.scales": scales}
        with np.errstate(over="ignore"):  # 127 * (largest / 127) may round past the largest float32
            read = narrowed(data, np.clip(whole.astype(np.float32) * scales, LOWEST, -LOWEST))
    else:
        arrays[name] = read = narrowed(data, data)
    bounds = range(len(data) + 1) if offsets is None else offsets.tolist()
    parts = [read[a:b] for a, b in itertools.pairwise(bounds)]
    return arrays, [part[0] if offsets is None else np.moveaxis(part, 0, axis) for part in parts]


def narrowed(original: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `values` in the dtype that `original` leaves: fp16, the bits of bf16, fp32; int64 in int32 if it fits."""
    if original.dtype == np.int64:
        return values.astype(np.int32) if np.array_equal(original.astype(np.int32), original) else values
    largest = float(np.abs(original).max(initial=0)) if original.dtype == np.float32 else None
    if largest is None:
        return values
    if largest < 65520:
        return values.astype(np.float16)
    if largest >= abs(LOWEST):
        return values.astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def quantised(data: np.ndarray, *, per_channel: bool, ragged: bool) -> tuple[np.ndarray, np.ndarray]:
    if per_channel:
        channel = data.ndim - 1 if data.ndim < 4 else 1
        spread = tuple(axis for axis in range(data.ndim) if axis != channel)
    else:
        spread = tuple(range(2 if data.ndim > 2 and not ragged else 1, data.ndim))
    largest = np.abs(data).max(spread, keepdims=True) if data.size else np.abs(data)
    scales = (largest / np.float32(127)).astype(np.float32)
    whole = np.rint(data / np.where(scales > 0, scales, 1)).clip(-127, 127).astype(np.int8)
    return whole, scales


def grouped(data: np.ndarray) -> np.ndarray:
    """Return the rows of bytes of int4-group."""
    flat = data.reshape(len(data), int(np.prod(data.shape[1:])))
    groups = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 64))).reshape(-1, 64)
    if not groups.size:
        return np.empty((len(data), 0), np.uint8)
    median = np.sort(groups, -1)[:, 31:32]
    place = np.abs(groups - median).argmax(-1, keepdims=True)
    largest = np.take_along_axis(groups, place, -1)
    np.put_along_axis(groups, place, median, -1)
    turned = groups * golden_reader.SIGNS @ golden_reader.HADAMARD
    offset = bfloat16((turned.min(-1, keepdims=True) + turned.max(-1, keepdims=True)) / 2)
    scale = bfloat16(np.abs(turned - offset).max(-1, keepdims=True) / np.float32(7.5))
    whole = np.rint((turned - offset) / np.where(scale > 0, scale, 1) + np.float32(7.5)).clip(0, 15).astype(np.uint8)
    floats = np.concatenate([scale, offset, bfloat16(largest)], -1).view(np.uint32) >> 16
    parts = [floats.astype("<u2").view(np.uint8), place.astype(np.uint8), whole[:, :32] | whole[:, 32:] << 4]
    return np.concatenate(parts, -1).reshape(len(data), -1)


def bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def main() -> None:
    shutil.rmtree(STORES, ignore_errors=True)
    expected: dict[str, np.ndarray] = {}
    for codec in CODECS:
        store = Store.create(STORES / codec, recipe(codec))
        for number, (own, tensors, bad) in enumerate(segments(codec)):
            info = store.write_segment(own, tensors, bad)
            there = f"{codec}/{number}"
            expected[f"{there}/id"] = np.array(info.id)
            expected[f"{there}/keys"] = own
            expected[f"{there}/set_aside"] = keys(0, 0) if bad is None else bad
            for name, values in tensors.items():
                arrays, samples = stored(codec, name, values)
                expected |= {f"{there}/{array}": data for array, data in arrays.items()}
                expected |= {f"{there}/{name}#{row}": sample for row, sample in enumerate(samples)}
    np.savez_compressed(EXPECTED, **expected)


if __name__ == "__main__":
    main()
