import hashlib
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.files import check_sha256, is_function, load_function, locate, sha256


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package that must not be imported."""
    root = tmp_path / "site" / "shipped"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "inner" / "weights.bin").write_bytes(b"abc")
    (tmp_path / "secret").write_text("s")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "shipped"


def test_package_files_are_found_without_importing(package: str) -> None:
    found = locate(f"package:{package}/inner/weights.bin", "model.weights")
    assert found.read_bytes() == b"abc"
    assert package not in sys.modules


@pytest.mark.parametrize(
    "inner", ["../../secret", "inner/../../../secret", "/etc/passwd", "", "inner/absent", "./../x"]
)
def test_inner_paths_stay_inside(package: str, inner: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        locate(f"package:{package}/{inner}", "data.path")


@pytest.mark.parametrize("name", ["package:no_such_package/x", "package:a.b/x", "package:/x", "nowhere/at/all"])
def test_what_is_not_there_is_told_with_its_setting(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is '.*'"):
        locate(name, "data.path")


def test_digest_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 3_000_000)
    digest = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert sha256(file) == digest
    check_sha256(file, digest.upper(), "data")
    check_sha256(file, None, "data")
    with pytest.raises(ConfigError, match=rf"data\.sha256 is {'0' * 64}; .* has {digest}"):
        check_sha256(file, "0" * 64, "data")
    with pytest.raises(ConfigError, match="not a file"):
        check_sha256(tmp_path, digest, "data")


def test_functions_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_own.py").write_text("def make(x):\n    return x + 1\nvalue = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("users_own:make", "data.source", "config: DataConfig")(1) == 2
    with pytest.raises(ConfigError, match="no function value"):
        load_function("users_own:value", "data.source", "config: DataConfig")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_function("users_other:make", "data.source", "config: DataConfig")


def test_is_function() -> None:
    assert is_function("a.b:c")
    assert not any(map(is_function, ("images", "a:", ":b", "a:b:c", "a b:c", "1a:b")))
