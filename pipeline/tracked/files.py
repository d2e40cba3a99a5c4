"""The objects of a DVC remote: through obstore where it knows the service and has credentials, else through DVC's own
file systems, which know all services and find credentials in more places.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import StoreError
from pipeline.store import Bucket

PAUSES = (1, 4, 10)
"""Seconds to wait before a request that failed is made again, where DVC's file systems make it."""
BY_OBSTORE: Mapping[str, Mapping[str, str]] = {
    "s3": {
        "access_key_id": "access_key_id",
        "secret_access_key": "secret_access_key",
        "session_token": "session_token",
        "endpointurl": "endpoint",
        "region": "region",
    },
    "gs": {"credentialpath": "service_account"},
    "azure": {"account_name": "account_name", "account_key": "account_key", "sas_token": "sas_token"},
}
"""Per service: DVC's names of the settings that obstore needs -> obstore's names."""
CREDENTIALS = {
    "s3": ("access_key_id", "AWS_ACCESS_KEY_ID"),
    "gs": ("service_account", "GOOGLE_APPLICATION_CREDENTIALS"),
    "azure": ("account_key", "AZURE_STORAGE_ACCOUNT_KEY"),
}
"""Per service: the option or the variable that gives obstore credentials; DVC's clients find them in more places."""
SCHEMES = {"s3": "s3", "gs": "gs", "azure": "az"}
IRRELEVANT = re.compile(r"acl|grant_|sse$|sse_kms|listobjects|cache_regions|projectname|.*timeout|jobs|checksum_jobs")
"""Settings of a remote that change nothing about how its objects are read."""


class Files(Protocol):
    """The objects of a remote, by their paths below it."""

    def size(self, path: str) -> int:
        """Return the size of an object in bytes; raises FileNotFoundError if it does not exist."""

    def read(self, path: str) -> bytes:
        """Return the whole object; raises FileNotFoundError if it does not exist."""

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        """Return the bytes `begin` to `end` of an object that has at least so many."""


class ThroughDvc:
    """The objects of a remote of any kind, through DVC's own file system."""

    def __init__(self, file_system: Any, root: str, remote: str) -> None:
        """Read below `root`; `remote` is its name."""
        self._fs, self._root, self._remote = file_system, root, remote

    def size(self, path: str) -> int:
        """Return the size of an object in bytes."""
        return int(self._persist(path, lambda where: self._fs.info(where)["size"]))

    def read(self, path: str) -> bytes:
        """Return the whole object."""
        found: bytes = self._persist(path, self._fs.cat_file)
        return found

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        """Return the bytes `begin` to `end` of an object."""
        part: bytes = self._persist(path, lambda where: self._fs.cat_file(where, start=begin, end=end))
        if len(part) != end - begin:
            raise StoreError(f"remote {self._remote}: {path} ends early; fetch it again with dvc, or push it anew")
        return memoryview(part)

    def _persist(self, path: str, action: Any) -> Any:
        where = self._fs.join(self._root, path)
        for pause in (*PAUSES, None):
            try:
                return action(where)
            except FileNotFoundError:
                raise
            except Exception as error:  # each service's client has errors of its own
                if pause is None or isinstance(error, PermissionError):
                    raise StoreError(f"remote {self._remote}: {path} cannot be read ({_reason(error)})") from None
                time.sleep(pause)
        raise AssertionError  # the last pause is None


def files_of(file_system: Any, root: str, remote: str) -> Files:
    """Return a reader of the objects below `root`: obstore if it supports the settings of the remote."""
    service = file_system.protocol
    if service == "local":
        if not Path(root).is_dir():
            raise StoreError(f"DVC's remote {remote}: {root} is not there; mount it, push to it, or name another")
        return Bucket(Path(root).absolute().as_uri())
    config = {name: value for name, value in file_system.config.items() if value not in (None, False)}
    known = BY_OBSTORE.get(service, {})
    usual = {"tmp_dir", "use_ssl", "bucket", "host", "url", *known}
    others = [name for name in config if name not in usual and not IRRELEVANT.match(name)]
    options = {known[name]: str(value) for name, value in config.items() if name in known}
    option, variable = CREDENTIALS.get(service, ("", ""))
    if not known or others or not (option in options or variable in os.environ):
        return ThroughDvc(file_system, root, remote)
    return Bucket(f"{SCHEMES[service]}://{root}", secrets=options)


def object_path(md5: str) -> str:
    return f"{md5[:2]}/{md5[2:]}"


def _reason(error: Exception) -> str:
    """Return the reason of an error without quoting the server, which may repeat signed requests."""
    message = getattr(error, "strerror", None) or getattr(error, "reason", None)
    return f"{type(error).__name__}: {message}" if isinstance(message, str) else type(error).__name__
