"""Digests: content keys of samples, digests of weights and settings, and the recipe of a store.

Every digest is BLAKE2b with 128 bits over an encoding that cannot be read in two ways: canonical JSON for settings,
type-tagged and length-prefixed fields for contents and weights.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Content: TypeAlias = "bool | int | float | str | bytes | np.ndarray | Sequence[Content] | Mapping[str, Content] | None"

KEY_BYTES = 16
ABSENT = "(absent)"
MAX_DEPTH = 64
_STRING = re.compile(r'"(?:[^"\\]+|\\.)*+"?', re.DOTALL)
_HASHED_KINDS = "biufc"  # numpy kinds whose bytes are their value: bool, integers, floats, complex


def digest(value: JSON) -> str:
    """Return the digest of `value` as 32 hex digits; equal for equal settings, whatever the order of their keys.

    Raises:
        TypeError: a mapping key is no string, or a value has no JSON form.
        ValueError: a number is not finite.
    """
    return hashlib.blake2b(_canonical(value).encode(), digest_size=KEY_BYTES).hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON from an untrusted source.

    Raises:
        ValueError: the text is not JSON, names a field of an object twice, or is nested more than 64 deep.
    """
    depth = 0
    for brackets in re.findall(r"[\[{]+|[\]}]+", _STRING.sub("", text)):
        depth += len(brackets) if brackets[0] in "[{" else -len(brackets)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_doubles)


def content_key(content: Content) -> bytes:
    """Return the 16-byte key of a sample's content.

    The type is part of the content: the text "a", the bytes b"a" and the array [97] have different keys. An array
    brings its dtype and shape; memory layout and byte order do not matter.

    Raises:
        TypeError: the content, or a part of it, is of a type without a key (named in the message).
    """
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    _feed(hasher, content)
    return hasher.digest()


def tensors_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return the digest of named tensors (names, dtypes, shapes, bytes), whatever their order, device or strides.

    At most one tensor at a time is copied.

    Raises:
        ValueError: a tensor is on the meta device, and so has no bytes.
    """
    import torch  # noqa: PLC0415  (keys of contents need none, and it is slow to import)

    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta:
            raise ValueError(
                f"tensor {name!r} is on the meta device and has no bytes; load the weights before the digest"
            )
        _field(hasher, b"n", name.encode())
        _field(hasher, b"t", f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.cpu().resolve_conj().resolve_neg().reshape(-1)
        _field(hasher, b"d", flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


DIGESTS = ("weights", "architecture")
"""Fields of a recipe that say less to a reader than the others."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything that decides the values of a store's states; two recipes are equal when their digests are.

    Attributes:
        format: version of the store's layout.
        weights: digest of every parameter and buffer read before the cut (`tensors_digest`).
        architecture: digest of the modules called before the cut.
        cut: place of the split, readable.
        preprocessing: everything that decides the inputs of the prefix.
        view: name of the augmented view; None for the plain one.
        compute_dtype: dtype the prefix ran in.
        storage: codec and dtype of the stored states, such as "raw:float16".
    """

    format: int
    weights: str
    architecture: str
    cut: str
    preprocessing: Mapping[str, JSON]
    view: str | None
    compute_dtype: str
    storage: str

    def __post_init__(self) -> None:
        # A private copy in JSON's own types: later changes to the caller's dict do not reach it, tuples become lists.
        object.__setattr__(self, "preprocessing", json.loads(_canonical(self.preprocessing)))

    @property
    def digest(self) -> str:
        """The store's identity, 32 hex digits."""
        return digest(vars(self))

    def to_json(self) -> str:
        """Return the recipe as indented JSON, fields in their order, with a final newline."""
        return json.dumps(vars(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Return the recipe written by `to_json`.

        Raises:
            ValueError: the text is not a recipe; the message names the field.
        """
        raw = parse_json(text)
        if not isinstance(raw, dict):
            raise ValueError(f"a recipe is a JSON object, not {type(raw).__name__}")
        for name in dict.fromkeys([*_FIELD_TYPES, *raw]):
            if name not in _FIELD_TYPES:
                raise ValueError(f"unknown field {name!r}; a recipe has {', '.join(_FIELD_TYPES)}")
            if name not in raw:
                raise ValueError(f"field {name!r} is missing")
            if not isinstance(raw[name], _FIELD_TYPES[name]) or isinstance(raw[name], bool):
                raise ValueError(f"field {name!r} is {raw[name]!r}, which is no {_FIELD_TYPES[name]}")
        return cls(**raw)

    def first_difference(self, other: "Recipe") -> tuple[str, JSON, JSON] | None:
        """Return the first field that differs, as the function `first_difference` does: settings before digests."""
        ours, theirs = (
            {name: getattr(recipe, name) for name in sorted(vars(recipe), key=DIGESTS.__contains__)}
            for recipe in (self, other)
        )
        return first_difference(ours, theirs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.digest == other.digest

    def __hash__(self) -> int:
        return int(self.digest, 16)


_FIELD_TYPES: dict[str, Any] = {field.name: str for field in dataclasses.fields(Recipe)} | {
    "format": int,
    "preprocessing": dict,
    "view": str | None,
}


def first_difference(ours: Mapping[str, JSON], theirs: Mapping[str, JSON]) -> tuple[str, JSON, JSON] | None:
    """Return (path of the first setting that differs, its value in `ours`, in `theirs`); None when all are equal.

    The path reads like `preprocessing.image_size`; a value that one side lacks is given as "(absent)".
    """
    return next(_differences(ours, theirs, ""), None)


def _differences(ours: Mapping[str, JSON], theirs: Mapping[str, JSON], prefix: str) -> Iterator[tuple[str, JSON, JSON]]:
    for name in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(name, ABSENT), theirs.get(name, ABSENT)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from _differences(mine, other, f"{prefix}{name}.")
        elif _canonical(mine) != _canonical(other):
            yield f"{prefix}{name}", mine, other


def _canonical(value: JSON) -> str:
    _refuse_other_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _refuse_other_keys(value: JSON) -> None:
    """json.dumps writes the key 1 as "1"; two different settings must not share a digest."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"mapping key {key!r} is {type(key).__name__}; a digest needs string keys")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is named twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _field(hasher: hashlib.blake2b, tag: bytes, data: bytes | memoryview) -> None:
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    hasher.update(tag + size.to_bytes(8, "little"))
    hasher.update(data)


def _feed(hasher: hashlib.blake2b, content: Content) -> None:
    match content:
        case str():
            _field(hasher, b"s", content.encode("utf-8", "surrogatepass"))
        case bytes():
            _field(hasher, b"b", content)
        case np.ndarray() | np.generic():
            _feed_array(hasher, np.asarray(content))
        case None | bool() | int() | float():
            _field(hasher, b"j", repr(content).encode())
        case Mapping():
            _field(hasher, b"m", len(content).to_bytes(8, "little"))
            for name in sorted(content):
                _feed(hasher, name)
                _feed(hasher, content[name])
        case list() | tuple():
            _field(hasher, b"l", len(content).to_bytes(8, "little"))
            for item in content:
                _feed(hasher, item)
        case _:
            raise TypeError(
                f"{type(content).__name__} has no content key; give bytes, text, an array, or mappings and lists"
            )


def _feed_array(hasher: hashlib.blake2b, array: np.ndarray) -> None:
    if array.dtype.kind not in _HASHED_KINDS:
        raise TypeError(f"an array of dtype {array.dtype} has no content key; give booleans, integers or floats")
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    _field(hasher, b"a", f"{little.dtype.str} {little.shape}".encode())
    _field(hasher, b"d", little.tobytes())
