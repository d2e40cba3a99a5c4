"""A reader written from docs/store-format.md alone: standard library, numpy, and numcodecs for blosc."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc

TYPES = {
    "float16": "<f2", "float32": "<f4", "uint16": "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "|i1", "uint8": "|u1", "uint32": "<u4", "bool": "|b1",
}  # fmt: skip
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}


class WrongError(Exception):
    """The store is not what was written."""


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_entry(byte) for byte in range(256)]


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def segment_id(keys: np.ndarray) -> str:
    shape = f"|u1 {tuple(keys.shape)}".encode()
    hasher = hashlib.blake2b(digest_size=16)
    for tag, data in ((b"a", shape), (b"d", keys.tobytes())):
        hasher.update(tag + len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()


def read_array(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an array as stored, and its metadata."""
    meta = json.loads((folder / "zarr.json").read_bytes())
    shape, chunk_shape = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    dtype = np.dtype(TYPES[meta["data_type"]])
    if math.prod(shape) == 0:
        return np.empty(shape, dtype), meta
    chunks = []
    for number in range(-(-shape[0] // chunk_shape[0])):
        raw = (folder / ".".join(["c", str(number), *["0"] * (len(shape) - 1)])).read_bytes()
        body = raw[:-4]
        if crc32c(body) != int.from_bytes(raw[-4:], "little"):
            raise WrongError(f"{folder}: checksum of chunk {number}")
        if len(meta["codecs"]) == 3:
            body = Blosc().decode(body)
        chunks.append(np.frombuffer(body, dtype).reshape(chunk_shape))
    return np.concatenate(chunks)[: shape[0]], meta


def read_segment(folder: Path, recipe: str) -> tuple[np.ndarray, list[str], dict[str, list[np.ndarray]]]:
    """Return the keys of the samples, those of the bad ones in hex, and each tensor's samples; bf16 as float32."""
    group = json.loads((folder / "zarr.json").read_bytes())["attributes"]
    if group["format"] != 2 or group["recipe"] != recipe:
        raise WrongError(f"{folder}: format {group['format']}, recipe {group['recipe']}")
    arrays = {path.parent.name: read_array(path.parent) for path in folder.glob("*/zarr.json")}
    sealed = {"segment": {**group, "seal": ""}, "arrays": {name: meta for name, (_, meta) in arrays.items()}}
    if digest(sealed) != group["seal"]:
        raise WrongError(f"{folder}: seal")
    keys, sums = arrays["keys"][0], arrays["sums"][0]
    if segment_id(keys) != folder.name or len(keys) != group["samples"]:
        raise WrongError(f"{folder}: keys")
    tensors = {}
    for column, name in enumerate(group["tensors"]):
        data, meta = arrays[name]
        axis = meta["attributes"].get("ragged_axis")
        bounds = np.arange(len(data) + 1) if axis is None else arrays[f"{name}.offsets"][0]
        for row in range(len(keys)):
            if crc32c(data[bounds[row] : bounds[row + 1]].tobytes()) != sums[row, column]:
                raise WrongError(f"{folder}: sample {row} of {name}")
        scales = arrays[f"{name}.scales"][0] if f"{name}.scales" in arrays else None
        attributes = meta["attributes"]
        if "codec" in attributes:
            data, scales = unpacked(data, attributes["codec"], attributes["entry_shape"]), np.ones((), np.float32)
        values = meant(data, scales, attributes["dtype"])
        parts = [values[bounds[row] : bounds[row + 1]] for row in range(len(keys))]
        tensors[name] = [part[0] if axis is None else np.moveaxis(part, 0, axis) for part in parts]
    return keys, group["set_aside"], tensors


HADAMARD = np.ones((1, 1), np.float32)
for _ in range(6):
    HADAMARD = np.block([[HADAMARD, HADAMARD], [HADAMARD, -HADAMARD]])
HADAMARD = HADAMARD / np.float32(8)
SIGNS = np.array([-1 if 0x243F6A8885A308D3 >> i & 1 else 1 for i in range(64)], np.float32)


def unpacked(data: np.ndarray, codec: str, shape: Sequence[int]) -> np.ndarray:
    """Return the values of a packed array in float32."""
    bits = {"int8-group": 8, "int4-group": 4}[codec]
    records = data.reshape(-1, 7 + 8 * bits)
    floats = (np.ascontiguousarray(records[:, :6]).view("<u2").astype(np.uint32) << 16).view(np.float32)
    whole = records[:, 7:] if bits == 8 else np.concatenate([records[:, 7:] & 15, records[:, 7:] >> 4], -1)
    values = (whole - np.float32(2**bits - 1) / 2) * floats[:, :1] + floats[:, 1:2]
    values = (values @ HADAMARD * SIGNS).astype(np.float32)
    np.put_along_axis(values, records[:, 6:7].astype(int), floats[:, 2:], -1)
    return values.reshape(len(data), -1)[:, : math.prod(shape)].reshape(len(data), *shape)


def meant(data: np.ndarray, scales: np.ndarray | None, dtype: str) -> np.ndarray:
    """Return the values that an array means."""
    if scales is not None:
        with np.errstate(over="ignore"):
            data = np.clip(data.astype(np.float32) * scales, -LARGEST[dtype], LARGEST[dtype])
        if dtype == "bfloat16":
            bits = data.view(np.uint32)
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
        return data.astype(dtype)
    if dtype == "bfloat16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(dtype)


def read_store(root: Path) -> Iterator[tuple[str, np.ndarray, list[str], dict[str, list[np.ndarray]]]]:
    """Yield id, keys, bad keys and tensors of every segment."""
    recipe = json.loads((root / "recipe.json").read_text(encoding="utf-8"))
    for folder in sorted(root.iterdir()):
        is_segment = len(folder.name) == 32 and set(folder.name) <= set("0123456789abcdef")
        if is_segment and (folder / "zarr.json").is_file():
            yield folder.name, *read_segment(folder, digest(recipe))
