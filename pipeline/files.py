"""Files and functions that settings name: on disk, in installed packages, and in the user's own modules.

Data and weights are both located here, so that a path means the same in every section of params.yaml.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import AbsentError, ConfigError

PACKAGE = "package:"


def locate(path: str, setting: str) -> Path:
    """Return the existing file or folder that `path` names, for the setting called `setting` (`data.path`).

    `path` is a path on disk or `package:PKG/inner/path`, a file that the installed package PKG ships. The package is
    looked up, never imported.

    Raises:
        AbsentError: nothing is there, or the package is not installed.
        ConfigError: the inner path leaves the package.
    """
    if path.startswith(PACKAGE):
        return _in_package(path, setting)
    found = Path(path).expanduser()
    if not found.exists():
        raise AbsentError(f"{setting} is {path!r}; nothing is there (looked in {found.absolute().parent}); set it")
    return found


def _in_package(path: str, setting: str) -> Path:
    package, _, inner = path.removeprefix(PACKAGE).partition("/")
    parts = PurePosixPath(inner).parts
    if not package.isidentifier() or not inner or PurePosixPath(inner).is_absolute() or ".." in parts:
        raise ConfigError(f"{setting} is {path!r}; expected package:PKG/inner/path, relative and without '..'")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AbsentError(f"{setting} is {path!r}; no package {package} is installed; install it or set another path")
    roots = [Path(root) for root in spec.submodule_search_locations]
    for root in roots:
        if (root / inner).exists():
            return root / inner
    raise AbsentError(f"{setting} is {path!r}; package {package} holds no {inner} (looked in {roots[0]})")


def check_sha256(file: Path, expected: str | None, setting: str) -> None:
    """Check that `file` has the SHA-256 digest `expected` (hex); None asks for no check.

    Raises:
        ConfigError: the digest differs, or `file` is not one readable file.
    """
    if expected is None:
        return
    if not file.is_file():
        raise ConfigError(f"{setting}.sha256 is set, but {file} is not a file; remove sha256 or name one file")
    found = sha256(file)
    if found != expected.lower():
        raise ConfigError(
            f"{setting}.sha256 is {expected}; {file} has {found}; fetch the file again, or set the new digest"
        )


def sha256(file: Path) -> str:
    """Return the SHA-256 digest of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary file that replaces `path` at the end unless an error is raised; create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` atomically; create the folder."""
    with whole(path) as beside:
        # A file name that is not UTF-8 is written with escapes: what tells of it must be readable.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def open_to_others(folder: Path) -> None:
    """Give all files below `folder` the permissions of a new file: safetensors keeps what it writes to its owner."""
    new = folder / f".{os.getpid()}.part"
    new.touch(exist_ok=False)
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def is_function(name: str) -> bool:
    """Return whether `name` has the form `module:function`."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str, setting: str, takes: str) -> Callable[..., Any]:
    """Import and return the user's own `module:function`, of the current folder or of an installed package.

    `takes` names its one argument.

    Raises:
        ConfigError: the module cannot be imported, has no such function, or it cannot be called with one argument.
    """
    module_name, _, function_name = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # a console script does not look in the current folder
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of the user's own code
        raise ConfigError(
            f"{setting} is {name!r}; module {module_name} cannot be imported ({type(error).__name__}: {error}); mend "
            f"it, install it, or put it in the folder of params.yaml ({os.getcwd()})"
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{setting} is {name!r}; {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(object())
    except TypeError as error:
        raise ConfigError(
            f"{setting} is {name!r}; it takes {inspect.signature(function)}, and is called with one argument "
            f"({error}); write it as def {function_name}({takes})"
        ) from error
    except ValueError:  # a function of C says nothing of its arguments
        pass
    return function
