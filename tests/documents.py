"""Finds what a text names (paths, names, links, commands, options, settings) and does not exist."""

import ast
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from pipeline.config import Section, sections_in
from pipeline.project.settings import SECTIONS
from stages.cli import recycle

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"``?([^`]+)``?")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FOLDER = r"(?:pipeline|stages|tests|docs|benchmarks|examples|\.ci)"
PATH = re.compile(
    rf"(?<![\w/.:*<-])({FOLDER}/[\w./*-]*|(?:data|results)/[\w./<>-]+|(?:[\w-]+/)*[\w-]+\.(?:py|md|svg|yaml|toml))(?![\w/])"
)
DOTTED = re.compile(r"(?<![\w/.:])(?:pipeline|stages)(?:\.[A-Za-z_]\w*)+(?![\w/])")
SETTING = re.compile(rf"({'|'.join(SECTIONS)})\.(\w+)((?:\.\w+)*)(?![\w.])")
COMMAND = re.compile(r"(?:(?<![\w./=-])recycle|-m stages\.cli)((?:\s.*)?)$")
VERB = re.compile(r"(?<!to )\brecycle ([a-z][\w-]*)")
MAKE = re.compile(r"\bmake ([\w-]+)")

PLACEHOLDERS = re.compile(r"\b(NAME|X)\b")
"""Stand-ins for a name: a path or target with one must match some that exists."""
USERS_DATA = ("data/photos", "data/train-1.jsonl", "data/cloud_faq_dataset.jsonl", "results/sweep.json")
"""Data of the reader's own."""
OTHERS_DATA = ("data/text_classification", "data/ner")
"""Folders of the repositories that examples take their data from."""
READERS_FILES = ("load.py", "sweep.yaml")
"""In a folder that the reader exports; a list of runs."""
OTHERS_OPTIONS = {"--allow-missing", "--cloud", "--memory-limit", "--name", "--pull", "--resources"}
"""Options of DVC, dask and sbatch."""
FILES = {"conll", "csv", "json", "jsonl", "npz", "parquet", "py", "safetensors", "yaml"}
"""What comes after a dot in `train.jsonl` and other names that look like settings."""


def outputs() -> Iterator[str]:
    """Yield what the stages of dvc.yaml write, without the parts that depend on a setting."""
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values():
        for entry in [entry for kind in ("deps", "outs", "metrics", "plots") for entry in stage.get(kind, [])]:
            name: str = entry if isinstance(entry, str) else next(iter(entry))
            if not name.startswith("$"):
                yield name.partition("/$")[0]


DATA = (*outputs(), *USERS_DATA, *OTHERS_DATA, "data/mnist_5k.csv.gz", "data/plots.json", "results/plan.json")
TARGETS = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def faults(text: str, folder: Path) -> list[str]:
    """Return what `text`, of a file in `folder`, names that does not exist."""
    spans = [" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", text))]
    shown = [block for language, block in BLOCK.findall(text) if language in ("", "bash")]
    lines = [line.partition(" #")[0] for block in shown for line in block.splitlines()]
    code = [part for line in [*spans, *lines] for part in re.split(r"[;|]|&&", line)]
    return [
        *(f"path {path}" for path in PATH.findall(text) if not exists(path, folder)),
        *(f"name {name}" for name in DOTTED.findall(text) if not resolves(name)),
        *(f"link {path}#{anchor}" for path, anchor in LINK.findall(text) if not leads(path, anchor, text, folder)),
        *(f"command recycle {verb}" for verb in VERB.findall(text) if verb not in VERBS),
        *(f"target {name}" for part in code for name in MAKE.findall(part) if not is_target(name)),
        *(f"{fault} in {part}" for part in code for fault in command_faults(part)),
        *(
            f"setting {found[0]}.{found[1]}{found[2]}"
            for part in code
            for found in named_settings(part)
            if not is_setting(*found)
        ),
    ]


def exists(path: str, folder: Path) -> bool:
    path = path.rstrip(".:,/")
    if path in READERS_FILES:
        return True
    if path.startswith(("data/", "results/")):
        return any(path == known or path.startswith(f"{known}/") for known in DATA) or (folder / path).exists()
    pattern = PLACEHOLDERS.sub("*", path)
    return any(next(place.glob(pattern), None) is not None for place in (ROOT, ROOT / "pipeline", folder))


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if module := find_module(".".join(parts[:end])):
            return len(parts) == end or hasattr(module, parts[end])
    return False


def find_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def leads(path: str, anchor: str, text: str, folder: Path) -> bool:
    """Whether a link leads to a file, and to a heading of it."""
    if path and not (folder / path).exists():
        return False
    if not anchor:
        return True
    target = (folder / path).read_text(encoding="utf-8") if path else text
    return anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(target)}


def is_target(name: str) -> bool:
    return any(re.fullmatch(target.replace("%", r"[\w-]+"), name) for target in TARGETS)


VERBS = recycle.list_commands(click.Context(recycle))


def options_of(command: click.Command) -> set[str]:
    return {option for param in command.params for option in param.opts} | {"--help", "--version"}


def every_option(command: click.Command = recycle) -> set[str]:
    found = options_of(command)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found |= every_option(inner)
    return found


EVERY_OPTION = every_option() | OTHERS_OPTIONS


def command_faults(line: str) -> Iterator[str]:
    """Yield what is wrong with a command line of `recycle`, or with a single option."""
    if line.startswith("--") and (option := re.split(r"[ =]", line)[0]) not in EVERY_OPTION:
        yield f"option {option}"
    if (called := COMMAND.search(line)) is None:
        return
    command: click.Command = recycle
    for word in re.sub("[\"']", "", called[1]).split():
        inner = command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None
        if inner is not None:
            command = inner
        elif word.startswith("--") and word.split("=")[0] not in options_of(command):
            yield f"option {word}"
        elif isinstance(command, click.Group) and not word.startswith("-"):
            yield f"command {word}"
            return


def named_settings(part: str) -> Sequence[tuple[str, str, str]]:
    """Return the settings in a code span that is one, and those that a command sets."""
    own = SETTING.match(part)
    found = [own.groups()] if own else []
    found += [match.groups() for match in re.finditer(rf"(?:--set|-S|--set-param) '?{SETTING.pattern}", part)]
    return [(section, name, rest) for section, name, rest in found if name not in FILES]


def is_setting(section: str, name: str, rest: str) -> bool:
    known: list[type[Section]] = [SECTIONS[section]]
    for part in (name, *re.findall(r"\w+", rest)):
        fields = [found.model_fields[part] for found in known if part in found.model_fields]
        if not fields:
            return not known  # inside a mapping, such as `task.loss_options`, anything goes
        known = [inner for field in fields for inner in sections_in(field.annotation)]
    return True


def prose(path: Path) -> str:
    """Return the strings of a module that have several words: docstrings and messages."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return "\n\n".join(value for value in values if isinstance(value, str) and " " in value)


def comments(path: Path) -> str:
    return "\n".join(line.partition("#")[2] for line in path.read_text(encoding="utf-8").splitlines())


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))
