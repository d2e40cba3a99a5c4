"""A proxy on loopback in front of an HTTP server, which does to some answers what networks and servers do."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from services.s3 import Server

KINDS = ("503", "reset", "truncated", "short", "slow", "flipped")
SLOW_SECONDS = 3.0


class Proxy:
    """Passes requests on; `fail` says to which answers something happens, and `asked` and `sent` what passed."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.asked: list[tuple[str, str]] = []
        self.failed = 0
        self.sent = 0
        self._kind, self._part, self._methods, self._times = "", "", ("GET",), 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            of = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fail(self, kind: str, part: str, times: int = 1 << 30, methods: tuple[str, ...] = ("GET",)) -> None:
        """Do `kind` to the next `times` answers to requests of a path that has `part` in it."""
        assert kind in KINDS
        with self._lock:
            self._kind, self._part, self._methods, self._times, self.failed = kind, part, methods, times, 0

    def close(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str) -> str:
        """Return what is to happen to the answer to this request."""
        with self._lock:
            self.asked.append((method, path))
            if not self._times or method not in self._methods or self._part not in path:
                return ""
            self._times -= 1
            self.failed += 1
            return self._kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Proxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.of.fault(self.command, self.path)
        if fault == "503":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        connection = http.client.HTTPConnection(self.of.target, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read(), fault)
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815 http.server's own names

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        if fault == "flipped":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "reset" and self.command == "PUT":  # else it was answered
            self._reset()
            return
        length = len(body) if self.command != "HEAD" else int(headers.get("Content-Length") or 0)
        if fault == "short":
            body, length = body[: len(body) // 2], len(body) // 2
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault in ("reset", "truncated"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "reset":
                self._reset()
                return
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)
        self.of.sent += len(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the client, or a fault, closed the connection
            self.close_connection = True


@pytest.fixture
def proxy(s3_server: Server) -> Iterator[Proxy]:
    """A proxy in front of the S3 server; nothing fails yet."""
    made = Proxy(s3_server.endpoint)
    yield made
    made.close()
