"""params.yaml -> frozen, validated sections; every fault of the file is reported at once.

Each section class stands beside the code that reads it; this module only knows how to load one file into several.
"""

import codecs
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ConfigError


class Section(BaseModel):
    """One section of params.yaml, frozen: unknown keys are errors, and values are not coerced.

    A setting's docstring is its description, here and in docs/settings.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def _faults(self) -> Iterator[str]:
        """Yield the contradictions between settings, each with its remedy. Default: none."""
        return iter(())

    @model_validator(mode="after")
    def _refuse_faults(self) -> Self:
        if faults := list(self._faults()):
            raise ValueError("; ".join(faults))
        return self


def load_sections(
    path: Path, schema: Mapping[str, type[Section]], overrides: Mapping[str, Any] | None = None
) -> dict[str, Section]:
    """Return the sections of `path` named in `schema`, validated; `overrides` ("train.lr": 0.1) replace its values.

    Raises:
        ConfigError: the file is missing, is not YAML, or breaks the schema; the message has one line per fault,
            each with its path in the file, the value met, the bound and the remedy.
    """
    raw = read_yaml(path)
    set_values(raw, overrides or {})
    return check_sections(raw, schema, str(path))


def set_values(content: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Replace values of the content of a params.yaml, given by setting, as in {"train.lr": 0.1}."""
    for setting, value in overrides.items():
        *outer, name = setting.split(".")
        inside = content
        for step in outer:
            if not isinstance(inside.get(step), dict):
                inside[step] = {}
            inside = inside[step]
        inside[name] = value


def parse_override(text: str) -> tuple[str, Any]:
    """Return the setting and the value of "train.lr=0.001"; the value is read as YAML, as in the file.

    Raises:
        ConfigError: it does not have this form.
    """
    setting, equals, value = text.partition("=")
    if not equals or "" in setting.split(".") or "." not in setting:
        raise ConfigError(f"{text!r} sets nothing; write SECTION.SETTING=VALUE, as in train.lr=0.001")
    try:
        return setting, _parse(value)
    except YAMLError as error:
        raise ConfigError(f"{setting} is set to {value!r}, which is no YAML: {' '.join(str(error).split())}") from error


def parse_choices(text: str) -> tuple[str, list[Any]]:
    """Return the setting and the values of "train.lr=0.001,0.0001", each read as YAML.

    Raises:
        ConfigError: it does not have this form.
    """
    setting, _, values = text.partition("=")
    name, choices = parse_override(f"{setting}=[{values}]")
    if not choices:
        raise ConfigError(f"{text!r} has no value; write SECTION.SETTING=VALUE,VALUE, as in train.lr=0.001,0.0001")
    return name, choices


def check_sections(raw: Mapping[str, Any], schema: Mapping[str, type[Section]], where: str) -> dict[str, Section]:
    """Return the sections of `raw` named in `schema`, validated; `where` says in messages what holds them.

    Raises:
        ConfigError: as `load_sections`.
    """
    faults = [
        f"{where}: {key}: unknown section{_nearest(key, list(schema))}; remove it" for key in raw if key not in schema
    ]
    sections: dict[str, Section] = {}
    for name, section in schema.items():
        try:
            sections[name] = section.model_validate({} if raw.get(name) is None else raw[name])
        except ValidationError as error:
            faults += [f"{where}: {_fault(name, section, dict(item))}" for item in error.errors()]
    if faults:
        raise ConfigError("\n".join(faults))
    return sections


def _parse(text: str) -> Any:
    """Read YAML 1.2, as DVC does: 1e-5 is a number, and a duplicate key is an error."""
    return YAML(typ="safe", pure=True).load(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    try:
        raw = _parse(_decode(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); run from the folder that holds it") from error
    except YAMLError as error:
        told = str(error).partition("\n\nTo suppress")[0]  # the rest is advice for programs
        raise ConfigError(f"{path}: not valid YAML: {' '.join(told.split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds {type(raw).__name__}, expected a mapping")
    return raw


def _decode(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 if it begins with the mark that says so.

    Raises:
        ConfigError: it is in another encoding; the message names the line.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: line {line} holds the byte 0x{content[error.start]:02x}, which is no {encoding.upper()}; "
            "save the file as UTF-8"
        ) from error


def _fault(name: str, section: type[Section], item: dict[str, Any]) -> str:
    where = ".".join([name, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        *outer, key = map(str, item["loc"])
        known = list(_inner(section, outer).model_fields)
        holder = ".".join([name, *outer])
        return f"{where}: unknown setting{_nearest(key, known)}; {holder} has {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where}: missing; it has no default, set it"
    return f"{where}: {item['input']!r}: {item['msg'].removeprefix('Value error, ')}"


def _inner(section: type[Section], path: list[str]) -> type[Section]:
    """Return the section at `path` inside `section`."""
    for name in path:
        section = next(sections_in(section.model_fields[name].annotation))
    return section


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections in an annotation, such as `Annotated[AdapterConfig, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
