"""OpenSSH's server on loopback, for one user with a key of the session's own; its folders are those of this machine."""

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from services.loopback import free_port, start, wait_for

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
    port = free_port()
    (folder / "config").write_text("\n".join(_settings(folder, port)) + "\n")
    with ExitStack() as stack:
        process = start(stack, folder, [server, "-D", "-e", "-f", str(folder / "config")])
        wait_for(partial(_answers, port), process, folder / "sshd.out")
        yield Host(port, getpass.getuser(), folder / "user")


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


def _answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return connection.recv(4) == b"SSH-"
