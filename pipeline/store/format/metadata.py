"""The JSON of groups and arrays: strict models of what one file may say, and the proof of what several claim together.

zarr does not parse it because more must hold than zarr asks: only an array in exactly this layout may be memory-mapped,
and its claims must be confirmed by the segment's seal and by the sizes of its chunk files.

All functions that read raise CorruptStoreError where a file is missing or is not what this package writes; the message
names the file, the field, its value and what was expected.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.keys import Recipe, digest, first_difference, parse_json
from pipeline.store.format import names
from pipeline.store.format.codecs import CODECS
from pipeline.store.format.layout import ArraySpec, is_tensor_name
from pipeline.store.format.names import REMEDY, corrupt, read_file, unreadable

Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """A JSON object with exactly these fields; no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _check_names(tensors: tuple[str, ...]) -> tuple[str, ...]:
    if not all(map(is_tensor_name, tensors)) or len(set(tensors)) < len(tensors):
        raise ValueError("expected names of tensors, each once")
    return tensors


def _check_fill(value: object) -> object:
    if not isinstance(value, bool | int | float) or value != 0:
        raise ValueError("expected 0")
    return value


Length = Annotated[int, Field(ge=0, lt=1 << 63)]
Names = Annotated[tuple[str, ...], Strict(False), AfterValidator(_check_names)]  # JSON has lists and no tuples
Key = Annotated[str, Field(pattern=f"^{names.SEGMENT_ID.pattern}$")]


class SegmentSpec(StrictModel):
    """A segment's own metadata: the attributes of its zarr group.

    Attributes:
        recipe: digest of the recipe of its states.
        samples: how many it holds.
        tensors: names of its tensors, in the order of the columns of `sums`.
        set_aside: keys, in hex, of the bad samples of the same unit.
        seal: digest of all metadata of the segment, this field left out.
    """

    format: Literal[2]
    recipe: str
    samples: Length
    tensors: Names
    set_aside: Annotated[tuple[Key, ...], Strict(False)]
    seal: str

    @classmethod
    def new(cls, recipe: Recipe, samples: int, tensors: Iterable[str], bad: Iterable[str]) -> "SegmentSpec":
        """Return the metadata of a segment that is to be written, without its seal."""
        own = {"tensors": tuple(tensors), "set_aside": tuple(bad)}
        return cls(format=names.FORMAT, recipe=recipe.digest, samples=samples, **own, seal="")

    @property
    def attributes(self) -> dict[str, Any]:
        """The group's zarr attributes."""
        return self.model_dump(mode="json")

    def sealed(self, arrays: Mapping[str, Any]) -> "SegmentSpec":
        """Return the same with the seal over this metadata and that of `arrays`; ValueError if it is not JSON."""
        unsealed = self.attributes | {"seal": ""}
        return self.model_copy(update={"seal": digest({"segment": unsealed, "arrays": dict(arrays)})})


class _Group(StrictModel):
    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: SegmentSpec
    consolidated_metadata: None = None


class _ArrayAttributes(StrictModel):
    dtype: str
    ragged_axis: Length | None = None
    codec: str | None = None
    entry_shape: Annotated[tuple[Length, ...], Strict(False), Field(max_length=names.MAX_AXES)] | None = None


class _Array(StrictModel):
    """Fields that are given freely are typed here; the others follow from these, and are compared with `ArraySpec`."""

    zarr_format: Any
    node_type: Literal["array"]
    shape: Annotated[tuple[Length, ...], Strict(False), Field(min_length=1, max_length=names.MAX_AXES)]
    data_type: str
    attributes: _ArrayAttributes
    chunk_grid: Any
    chunk_key_encoding: Any
    codecs: Any
    dimension_names: Any
    fill_value: Annotated[Any, AfterValidator(_check_fill)]
    storage_transformers: Annotated[tuple[()], Strict(False)] = ()


def validated(where: Path, model: type[Model], raw: object) -> Model:
    """Return `raw`, which the file `where` holds, as a `model`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise corrupt(where, f"has {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """Return the first field that does not fit, its value, and what was expected."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "content"
    return f"{field} {reprlib.repr(first['input'])}: {first['msg'].removeprefix('Value error, ')}"


def read_recipe(store: Path) -> Recipe:
    """Return the recipe of the store at `store`.

    Raises:
        StoreError: no store is there, or one of a format that this version does not read.
        CorruptStoreError: `recipe.json` is no recipe.
    """
    where = store / names.RECIPE_FILE
    try:
        text = read_file(where, names.MAX_METADATA_BYTES)
        recipe = Recipe.from_json(text.decode("utf-8"))
    except OSError as error:
        raise StoreError(f"{where}: cannot be read ({error.strerror}); no store is here, encode first") from error
    except ValueError as error:
        raise CorruptStoreError(f"{where}: {error}; restore it, or remove the store and encode again") from error
    if recipe.format != names.FORMAT:
        raise StoreError(f"{where}: format is {recipe.format}, this version reads {names.FORMAT}; encode again")
    return recipe


def read_segment_spec(segment: Path) -> SegmentSpec:
    """Return the metadata of a segment. Its seal is not checked: see `read_arrays`."""
    return validated(segment / names.METADATA_FILE, _Group, read_metadata(segment)).attributes


def read_arrays(segment: Path, spec: SegmentSpec) -> dict[str, ArraySpec]:
    """Return the metadata of all arrays of a segment by name, once its seal proves that it is what was written."""
    raw: dict[str, dict[str, Any]] = {}
    arrays: dict[str, ArraySpec] = {}

    def read(name: str) -> ArraySpec:
        raw[name] = read_metadata(segment / name)
        arrays[name] = _parse_array(segment / name / names.METADATA_FILE, raw[name])
        return arrays[name]

    for name in (names.KEYS, names.SUMS):
        read(name)
    for name in spec.tensors:
        tensor = read(name)
        for suffix in (*([names.OFFSETS] if tensor.axis is not None else []), *tensor.codec.beside):
            read(f"{name}{suffix}")
    try:
        sealed = spec.sealed(raw)
    except ValueError as error:
        raise corrupt(segment, f"has metadata that cannot be sealed ({error})") from error
    if sealed.seal != spec.seal:
        raise corrupt(segment, "has metadata that does not match its seal")
    return arrays


def read_array_spec(array: Path) -> ArraySpec:
    """Return the metadata of an array; `check_chunks` proves its claims."""
    return _parse_array(array / names.METADATA_FILE, read_metadata(array))


def read_metadata(node: Path) -> dict[str, Any]:
    """Return the `zarr.json` of a group or an array as it stands there."""
    where = node / names.METADATA_FILE
    try:
        raw = parse_json(read_file(where, names.MAX_METADATA_BYTES).decode("utf-8"))
    except OSError as error:
        raise unreadable(where, error) from error
    except ValueError as error:
        raise CorruptStoreError(f"{where}: is not JSON ({error}); {REMEDY}") from error
    if not isinstance(raw, dict):
        raise corrupt(where, "is no JSON object")
    return raw


def _parse_array(where: Path, raw: dict[str, Any]) -> ArraySpec:
    fields = validated(where, _Array, raw)
    shape, stored = fields.shape, fields.data_type
    dtype, axis, packed = fields.attributes.dtype, fields.attributes.ragged_axis, fields.attributes.entry_shape
    specs = [
        ArraySpec(shape, dtype, stored, axis, codec, packed)
        for codec in CODECS.values()
        if codec.is_packed == (packed is not None)
    ]
    if axis is not None and axis > len(specs[0].entry):
        raise corrupt(where, f"has ragged_axis {axis} and {len(specs[0].entry) + 1} axes")
    fitting = [spec for spec in specs if stored in spec.codec.stored_types(dtype)]
    if not fitting:
        raise corrupt(where, f"stores {dtype!r} as {stored!r}")
    spec = next((one for one in fitting if _difference(where, raw, one) is None), None)
    if spec is None:
        raise corrupt(where, f"has {_difference(where, raw, fitting[0])}")
    if packed is not None and shape[1:] != (needed := (spec.codec.entry_bytes(packed),)):
        raise corrupt(where, f"has shape {shape}, {spec.codec.name} of values of shape {packed} needs {needed}")
    claimed = math.prod(max(1, length) for length in (shape[0], *spec.entry)) * spec.itemsize
    if not spec.nbytes and claimed > names.MAX_EMPTY_BYTES:
        raise corrupt(where, f"has no values and claims {claimed} bytes, at most {names.MAX_EMPTY_BYTES}")
    if spec.chunk_nbytes > spec.codec.max_chunk_bytes:
        limit = spec.codec.max_chunk_bytes
        raise corrupt(where, f"has chunks of {spec.chunk_nbytes} bytes, at most {limit} can be compressed")
    return spec


def _difference(where: Path, raw: dict[str, Any], spec: ArraySpec) -> str | None:
    """Return the first field of an array's metadata that is not as `spec` asks; None if all are."""
    given = raw | {"storage_transformers": []}
    expected = spec.metadata(where.parent.name) | {"fill_value": raw["fill_value"]}
    if repr(given) == repr(expected):  # as written: ten times as fast as the comparison in any order
        return None
    try:
        found = first_difference(given, expected)
    except ValueError as error:
        raise corrupt(where, f"has a value without canonical JSON ({error})") from error
    return None if found is None else f"{found[0]} {reprlib.repr(found[1])}, expected {found[2]!r}"
