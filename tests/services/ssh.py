"""OpenSSH's server on loopback, for one user with a key of the session's own; its folders are those of this machine."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 30
SEPARATION = Path("/run/sshd")
"""An empty folder that a server started by root insists on."""


@dataclass(frozen=True)
class Host:
    """A host that runs the server, and who may log in."""

    port: int
    user: str
    key: Path

    def url(self, folder: Path) -> str:
        """Return how `folder` is reached."""
        return f"ssh://{self.user}@127.0.0.1:{self.port}{folder}"


@pytest.fixture(scope="session")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The server, stopped for certain at the end."""
    server, keygen = (shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("sshd", "ssh-keygen"))
    if server is None or keygen is None:
        pytest.skip("no SSH server: the package openssh-server is not installed (apt-get install openssh-server)")
    if os.geteuid() == 0:
        SEPARATION.mkdir(mode=0o755, exist_ok=True)
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    port = _free_port()
    (folder / "config").write_text("\n".join(_settings(folder, port)) + "\n")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", folder / "config"], stdout=log, stderr=log)
        try:
            _wait(port, process, folder / "log")
            yield Host(port, getpass.getuser(), folder / "user")
        finally:
            process.terminate()
            process.wait()


def _settings(folder: Path, port: int) -> list[str]:
    return [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'authorized'}",
        f"PidFile {folder / 'pid'}",
        "AuthenticationMethods publickey",
        "StrictModes no",  # the key lies below a folder that others may write to
        "UsePAM no",
        "Subsystem sftp internal-sftp",
    ]


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"sshd did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
