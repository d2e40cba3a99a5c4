"""Processes that start at once: a server that has imported everything forks them, and each can be killed by itself."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
READY = "ready"
COMMANDS = [
    "stages.cli",
    "stages.encode",
    "stages.train",
    "pandas",
    "pipeline.encode.encoder",
    "pipeline.project.model",
    "pipeline.project.probe",
    "pipeline.workflows.encode",
    "pipeline.workflows.train",
    "pipeline.models.images",
    "pipeline.tasks.classification",
    "pyarrow.parquet",
    "tiny",
]
"""All that `recycle encode` and `recycle train` import for a tiny project."""


@dataclass(frozen=True)
class Child:
    """A forked process; what it says goes to `log`."""

    server: "Server"
    pid: int
    log: Path

    def kill(self) -> int | None:
        """Kill it by SIGKILL; return its exit code, which is -9 unless it had ended."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = 120) -> int | None:
        """Return its exit code, the negative number of the signal that ended it, or None if it goes on."""
        code: int | None = self.server.ask({"wait": self.pid, "seconds": seconds})
        return code

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Server:
    """Forks children that call one function."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, function: str, *args: Any, user: int = 0, log: str = "log") -> Child:
        """Call `module:function` in a child whose folder is `folder`, as the user with the number `user`."""
        file = folder / log
        pid = self.ask({"call": function, "args": args, "folder": str(folder), "log": str(file), "user": user})
        return Child(self, pid, file)


@contextmanager
def serving(*modules: str) -> Iterator[Server]:
    """Give a server that has imported `modules`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = [str(Path(__file__).parent), str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, __file__, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
    )
    with process:
        server = Server(process)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == READY
        try:
            yield server
        finally:
            assert process.stdin is not None
            process.stdin.close()


def serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    print(json.dumps(READY), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer = wait(**question) if "wait" in question else fork(**question)
        print(json.dumps(answer), flush=True)


def fork(call: str, args: list[Any], folder: str, log: str, user: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70  # what Python says of itself when it cannot go on
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        silence = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((silence, output, output)):
            os.dup2(descriptor, number)
        if user:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        os.chdir(folder)
        module, _, name = call.partition(":")
        getattr(sys.modules[module], name)(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(wait: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(wait, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


if __name__ == "__main__":
    serve(sys.argv[1:])
