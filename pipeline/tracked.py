"""Stores that DVC tracks, read from its remote without a checkout, with DVC's settings and credentials.

    dvc://REVISION:PATH[?remote=NAME]

The revision is any that git knows, or empty for dvc.lock in the working tree. DVC stores a folder as one object that
lists its files by their digests, and each file as an object named by its digest. Objects are read through obstore where
it knows the service and has credentials, else through DVC's own file systems, which know all services and find
credentials in more places.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, StoreError
from pipeline.files import write_whole
from pipeline.keys import digest
from pipeline.store import Bucket, ListedFile

SCHEME = "dvc://"
REQUESTS = 32
"""Number of objects whose sizes are requested at a time."""
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
_MD5 = re.compile(r"[0-9a-f]{32}")
_URL = re.compile(r"dvc://(?P<revision>[^:]*):(?P<path>[^?]+?)/*(?:\?remote=(?P<remote>[^?&]+))?")


@dataclass(frozen=True)
class Place:
    """The parts of a URL."""

    url: str
    revision: str
    """Revision of git; empty for the working tree."""
    path: str
    remote: str | None
    """Name of the remote; None for DVC's default."""

    @classmethod
    def of(cls, url: str) -> "Place":
        """Read a URL; raises ConfigError if it is not of this form."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError(f"{url!r} names no stores that DVC tracks; expected dvc://REVISION:PATH[?remote=NAME]")
        return cls(url, match["revision"], match["path"], match["remote"])


class Tracked:
    """The files below a place, as `Objects` that cannot be written.

    Attributes:
        url: the place.
        digest: identifies the content.
    """

    def __init__(
        self, place: Place, remote: str, files: "Bucket | ThroughDvc", found: Mapping[str, str], sizes: Path
    ) -> None:
        """Use `open_tracked`. `found` gives the MD5 digest of each file; `sizes` is where those known are noted."""
        self.url, self.digest = place.url, digest(dict(found))
        self._remote, self._files, self._found, self._sizes = remote, files, found, sizes

    def list(self, below: str) -> Iterator[tuple[str, ListedFile]]:
        """Yield the files below the folder `below`, by their whole paths; raises StoreError if one was never pushed."""
        inside = {path: md5 for path, md5 in self._found.items() if path.startswith(f"{below}/" if below else "")}
        sizes = self._sizes_of(inside)
        return iter([(path, ListedFile(sizes[md5], md5)) for path, md5 in inside.items()])

    def read(self, path: str) -> bytes:
        """Return a small file, whole; raises FileNotFoundError where there is none."""
        if path not in self._found:
            raise FileNotFoundError(2, "is not there", f"{self.url}/{path}")
        try:
            return self._files.read(_object_path(self._found[path]))
        except FileNotFoundError:
            raise _never_pushed(f"{self.url}/{path}", self._remote, self._found[path]) from None

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        """Return the bytes `begin` to `end` of a file."""
        return self._files.read_part(_object_path(self._found[path]), begin, end)

    def put(self, path: str, file: Path, *, anew: bool = False) -> str | None:
        """Refuse."""
        raise StoreError(f"{self.url}/{path}: what DVC tracks is read only; encode into a folder, then dvc push")

    def _sizes_of(self, files: Mapping[str, str]) -> dict[str, int]:
        """Return the sizes of objects by their digests, those that are not known from the remote."""
        try:
            known: dict[str, int] = json.loads(self._sizes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        wanted = {md5: path for path, md5 in files.items() if md5 not in known}

        def ask(md5: str) -> int:
            try:
                return self._files.size(_object_path(md5))
            except FileNotFoundError:
                raise _never_pushed(f"{self.url}/{wanted[md5]}", self._remote, md5) from None

        with ThreadPoolExecutor(REQUESTS, "sizes") as pool:
            known |= dict(zip(wanted, pool.map(ask, wanted), strict=True))
        if wanted:
            write_whole(self._sizes, json.dumps(known) + "\n")
        return known


def open_tracked(url: str, sizes: Path) -> Tracked:
    """Find the files that DVC tracks at a URL, in the project of the current folder.

    `sizes` is a file for the sizes of objects, which are asked for once.

    Raises:
        ConfigError: there is no such revision, output or remote; the message says what to set.
        StoreError: the list of files is not on the remote, or the remote cannot be read.
    """
    from dvc.exceptions import DvcException  # noqa: PLC0415  (slow to import, and needed here alone)
    from dvc.repo import Repo  # noqa: PLC0415
    from dvc_objects.fs.errors import ConfigError as BadRemote  # noqa: PLC0415
    from dvc_objects.fs.errors import RemoteMissingDepsError  # noqa: PLC0415

    place = Place.of(url)
    try:
        with Repo() as repo:
            with repo.switch(place.revision) if place.revision else nullcontext():
                folder, prefix, named, kind = _output(repo, place)
            name = place.remote or named or repo.config["core"].get("remote")
            objects = repo.cloud.get_remote_odb(name, "pull", hash_name=kind)
            files = _files_of(objects.fs, objects.path, str(name))
            listed, start = _listed(place, folder, files, str(name)), f"{prefix}/" if prefix else ""
            below = {path.removeprefix(start): md5 for path, md5 in listed.items() if path.startswith(start)}
            return Tracked(place, str(name), files, below, sizes)
    except (DvcException, RemoteMissingDepsError, BadRemote) as error:
        raise ConfigError(f"{url}: {_message(error, place)}") from None


def _output(repo: Any, place: Place) -> tuple[str, str, str | None, str]:
    """Return the digest of the output that holds a place, the place's path in it, its own remote, its kind of digest.

    Raises:
        ConfigError: it was never encoded.
        DvcException: DVC tracks nothing there.
    """
    (out, *_) = repo.find_outs_by_path(place.path, strict=False)
    value = out.hash_info.value if out.hash_info else None
    if value is None or not value.endswith(".dir"):
        raise ConfigError(f"{place.url}: DVC knows no folder there; encode (dvc repro encode), and commit dvc.lock")
    inside = out.fs.relparts(out.fs.abspath(place.path), out.fs_path)
    return value, "/".join(part for part in inside if part != "."), out.remote, out.hash_name


def _listed(place: Place, folder: str, files: "Bucket | ThroughDvc", remote: str) -> dict[str, str]:
    """Return the digest of every file in a folder."""
    try:
        text = files.read(_object_path(folder))
    except FileNotFoundError:
        raise _never_pushed(place.url, remote, folder) from None
    try:
        if hashlib.md5(text, usedforsecurity=False).hexdigest() != folder.removesuffix(".dir"):
            raise ValueError("its digest is another")
        found = {str(one["relpath"]): str(one["md5"]) for one in json.loads(text)}
        if not all(map(_MD5.fullmatch, found.values())):
            raise ValueError("it has other things than digests")
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{place.url}: {_object_path(folder)} on DVC's remote {remote} is no list of files ({error}); push it again"
        ) from None
    return found


def _object_path(md5: str) -> str:
    return f"{md5[:2]}/{md5[2:]}"


def _never_pushed(what: str, remote: str, md5: str) -> StoreError:
    return StoreError(f"{what} is not on DVC's remote {remote} ({_object_path(md5)}); whoever has it: dvc push")


def _message(error: Exception, place: Place) -> str:
    """Return DVC's fault and the remedy in one line."""
    from dvc.config import NoRemoteError, RemoteNotFoundError  # noqa: PLC0415
    from dvc.exceptions import NotDvcRepoError, OutputNotFoundError  # noqa: PLC0415
    from dvc.scm import RevError  # noqa: PLC0415

    if isinstance(error, RevError):
        return f"git knows no revision {place.revision!r} here; git fetch it, or name another"
    if isinstance(error, OutputNotFoundError):
        at = f" at {place.revision}" if place.revision else ""
        return f"{place.path} is no output that DVC tracks{at}; name one, such as data/activations"
    if isinstance(error, NotDvcRepoError):
        return "the current folder is in no DVC project; go to the project's"
    if isinstance(error, RemoteNotFoundError):
        return f"DVC has no remote {place.remote!r}; dvc remote list shows those there are"
    if isinstance(error, NoRemoteError):
        return "DVC has no default remote; set one (dvc remote add -d NAME URL), or name one (?remote=NAME)"
    return " ".join(str(error).split())


class ThroughDvc:
    """The objects of a remote of any kind, through DVC's own file system."""

    def __init__(self, file_system: Any, root: str, remote: str) -> None:
        """Read below `root`; `remote` is its name."""
        self._fs, self._root, self._remote = file_system, root, remote

    def size(self, path: str) -> int:
        """Return the size of an object in bytes; raises FileNotFoundError if it does not exist."""
        return int(self._persist(path, lambda where: self._fs.info(where)["size"]))

    def read(self, path: str) -> bytes:
        """Return the whole object; raises FileNotFoundError if it does not exist."""
        found: bytes = self._persist(path, self._fs.cat_file)
        return found

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        """Return the bytes `begin` to `end` of an object that has at least so many."""
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


def _files_of(file_system: Any, root: str, remote: str) -> Bucket | ThroughDvc:
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


def _reason(error: Exception) -> str:
    """Return the reason of an error without quoting the server, which may repeat signed requests."""
    message = getattr(error, "strerror", None) or getattr(error, "reason", None)
    return f"{type(error).__name__}: {message}" if isinstance(message, str) else type(error).__name__


def init_dvc(*, has_git: bool, is_root: bool) -> None:
    """Run `dvc init` in the current folder, which `is_root` says is the root of the git repository, if there is one."""
    from dvc.repo import Repo  # noqa: PLC0415

    Repo.init(no_scm=not has_git, subdir=has_git and not is_root).close()
