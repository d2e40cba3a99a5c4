"""What the services share: a port of their own, a start, and a certain end."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

START_SECONDS = 60
END_WITH_PARENT = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
"""Of util-linux: even where the tests are killed, what they started ends."""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ones."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def start(
    stack: ExitStack, folder: Path, command: list[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that ends with `stack`, or with this process; its log is in `folder`."""
    log = stack.enter_context((folder / f"{Path(command[0]).name}.out").open("ab"))
    process = subprocess.Popen(
        [*END_WITH_PARENT, *command],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    stack.callback(end, process)
    return process


def wait_for(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a service that was started answers; until then it may refuse connections."""
    last = time.monotonic() + START_SECONDS
    while time.monotonic() < last and process.poll() is None:
        with suppress(OSError):
            if answers():
                return
        time.sleep(0.1)
    raise RuntimeError(f"it did not start in {START_SECONDS} s:\n{log.read_text(errors='replace')[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, by force if need be."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
