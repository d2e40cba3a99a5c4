"""A project to encode."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A project with 12 good images, in the current directory."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="recycle")
    tiny.write_images(tmp_path / "photos", range(4))
    tiny.write_params(tmp_path)
    return tmp_path
