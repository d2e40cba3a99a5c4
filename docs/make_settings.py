"""Write docs/settings.md from the classes that define the sections of params.yaml: `make docs`."""

import json
import re
import types
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Section, sections_in
from pipeline.project.settings import SECTIONS
from pipeline.tasks.heads import LAYERS

PAGE = Path(__file__).with_name("settings.md")
INTRO = """# Settings

Every setting of `params.yaml`. `make docs` generates this page from the classes that read the file. Sections and
settings that are left out have their defaults. Unknown names are errors, and all faults of the file are reported at
once. `recycle train --set SETTING=VALUE` replaces a setting for one run. A meaning that starts with "images:" or
"similarity:" applies only to that source, kind or library. [Tasks, sources and predictions](tasks.md) shows which
settings go together.
"""
LAYERS_INTRO = """
## Layers of a head

The entries of `task.layers`: `name`, `{name: value}` (the value of its first option) or `{name: {option: value}}`. A
number is a linear layer of that width.

| Layer | Options | Meaning |
|---|---|---|
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", Any: "anything"}
BOUNDS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def page() -> str:
    """Return the text of docs/settings.md."""
    lines = [line for name, section in SECTIONS.items() for line in described(name, section)]
    layers = [layer(name, options) for name, options in LAYERS.items()]
    return INTRO + "".join(lines) + LAYERS_INTRO + "".join(layers)


def described(name: str, section: type[Section]) -> Iterator[str]:
    """Yield the heading and the table of a section, then those of the sections inside it."""
    inner: dict[type[Section], list[str]] = {}
    yield f"\n{'###' if '.' in name else '##'} `{name}`\n\n{cell(paragraph(section))}\n\n"
    yield "| Setting | Type | Default | Meaning |\n|---|---|---|---|\n"
    for setting, field in section.model_fields.items():
        for found in sections_in(field.annotation):
            if found not in SECTIONS.values():
                inner.setdefault(found, []).append(f"{name}.{setting}")
        kind = typed(field.annotation, field.metadata)
        yield f"| `{setting}` | {cell(kind)} | {default(field)} | {cell(field.description)} |\n"
    for found, names in inner.items():
        yield from described("` and `".join(names), found)


def layer(name: str, options: type[Section]) -> str:
    """Return the row of one kind of layer."""
    meanings = []
    for option, field in options.model_fields.items():
        value = "required" if field.is_required() else f"default {default(field)}"
        meanings.append(f"`{option}` ({typed(field.annotation, field.metadata)}; {value}): {field.description}")
    return f"| `{name}` | {cell(' '.join(meanings))} | {cell(paragraph(options))} |\n"


def typed(annotation: Any, bounds: list[Any]) -> str:
    """Return a type as a user writes its values, with the bounds of numbers and lengths."""
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        bounds = [*bounds, *(mark for item in more for mark in getattr(item, "metadata", [item]))]
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not types.NoneType]
        parts = [part for part in parts if part is not int or float not in parts]
        nothing = ["null"] if types.NoneType in get_args(annotation) else []
        return " or ".join([*(typed(part, bounds) for part in parts), *nothing])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        inside = [part for part in get_args(annotation) if part is not Ellipsis]
        kind = re.sub("(text|number|mapping)", r"\1s", typed(inside[0], []))
        return f"list of {f'({kind})' if ' or ' in kind else kind}{lengths(annotation, bounds)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    kind = NAMES[get_origin(annotation) or annotation]
    return kind + (limits(bounds) if annotation in (int, float) else lengths(annotation, bounds))


def limits(bounds: list[Any]) -> str:
    """Return the bounds of a number."""
    shown = [f"{BOUNDS[type(mark)]} {astuple(mark)[0]}" for mark in bounds if type(mark) in BOUNDS]
    return f" {', '.join(shown)}" if shown else ""


def lengths(annotation: Any, bounds: list[Any]) -> str:
    """Return the bounds of a list's or a text's length, and the pattern of a text."""
    least = next((mark.min_length for mark in bounds if isinstance(mark, MinLen)), None)
    pattern = next((mark.pattern for mark in bounds if getattr(mark, "pattern", None)), None)
    if annotation is str:
        return f" matching `{pattern}`" if pattern else " (not empty)" * bool(least)
    return f" (at least {least})" if least else ""


def default(field: FieldInfo) -> str:
    """Return a default as params.yaml would have it."""
    if field.default_factory_takes_validated_data:
        return "by kind"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section):
        return "its defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def paragraph(section: type[Section]) -> str:
    """Return the docstring of a class as one paragraph."""
    return " ".join((section.__doc__ or "").split())


def cell(text: str | None) -> str:
    """Return a text on one line, with what Markdown would take for markup escaped outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join((text or "").split()).replace("|", r"\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([<*])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
